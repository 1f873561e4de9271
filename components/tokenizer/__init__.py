"""Kinds of the role `tokenizer`, one a file; see lattice.protocols."""
