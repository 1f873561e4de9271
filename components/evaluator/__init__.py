"""Kinds of the role `evaluator`, one a file; see lattice.protocols."""
