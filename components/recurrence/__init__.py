"""Kinds of the role `recurrence`, one a file; see lattice.protocols."""
