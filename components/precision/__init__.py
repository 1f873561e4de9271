"""Kinds of the role `precision`, one a file; see lattice.protocols."""
