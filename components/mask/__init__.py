"""Kinds of the role `mask`, one a file; see lattice.protocols."""
