"""Kinds of the role `metrics`, one a file; see lattice.protocols."""
