"""Kinds of the role `schedule`, one a file; see lattice.protocols."""
