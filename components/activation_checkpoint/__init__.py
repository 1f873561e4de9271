"""Kinds of the role `activation_checkpoint`, one a file; see lattice.protocols."""
