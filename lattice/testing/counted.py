"""What the layers were given, seen by hooks: independent of what a recurrence declares."""

from __future__ import annotations

from typing import Any


def slots_of(inputs: tuple[Any, ...]) -> int:
    """Slots of each row that one call of a layer was for, from the call's positional arguments: what a
    forward pre-hook is given."""
    x_BLnD, given = inputs[0], inputs[5] if len(inputs) > 5 else None
    stages = x_BLnD.shape[2] + (0 if given is None else given.local.shape[2])
    return int(x_BLnD.shape[1] * stages)
