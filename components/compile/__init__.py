"""Kinds of the role `compile`, one a file; see lattice.protocols."""
