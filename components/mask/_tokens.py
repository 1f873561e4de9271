"""What masks have in common: causal order, padding, and a slot that always sees itself."""

from __future__ import annotations

from torch import Tensor

from lattice.slots import Slots


def causal_and_real(queries: Slots, keys: Slots) -> Tensor:
    """(B or 1, Q, K): causal order over slots, padding hidden."""
    allowed_BQK = queries.before_or_at(keys)[None]
    if keys.real_BS is not None:
        allowed_BQK = allowed_BQK & keys.real_BS[:, None]
    return allowed_BQK


def and_itself(allowed_BQK: Tensor, queries: Slots, keys: Slots) -> Tensor:
    """A slot of padding would otherwise see nothing, and its softmax would be NaN."""
    return allowed_BQK | queries.same_slot(keys)[None]
