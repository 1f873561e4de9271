"""Kinds of the role `parallel`, one a file; see lattice.protocols."""
