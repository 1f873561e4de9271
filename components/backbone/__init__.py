"""Kinds of the role `backbone`, one a file; see lattice.protocols."""
