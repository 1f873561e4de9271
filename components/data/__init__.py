"""Kinds of the role `data`, one a file; see lattice.protocols."""
