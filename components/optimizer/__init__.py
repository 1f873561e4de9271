"""Kinds of the role `optimizer`, one a file; see lattice.protocols."""
