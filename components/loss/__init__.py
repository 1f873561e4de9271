"""Kinds of the role `loss`, one a file; see lattice.protocols."""
