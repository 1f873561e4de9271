"""Kinds of the role `checkpoint`, one a file; see lattice.protocols."""
