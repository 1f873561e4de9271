"""Keys and values of earlier slots, for decoding.

Shapes: B batch, H key/value heads, S slots, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lattice.slots import Slots


class LayerCache:
    """Keys and values of one layer, in a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self._keys_BHSE: Tensor | None = None
        self._values_BHSE: Tensor | None = None
        self._length = 0

    def append(self, keys_BHSE: Tensor, values_BHSE: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new slots; returns those of all slots so far."""
        start, self._length = self._length, self._length + keys_BHSE.shape[2]
        self._keys_BHSE = _room(self._keys_BHSE, keys_BHSE, self._length)
        self._values_BHSE = _room(self._values_BHSE, values_BHSE, self._length)
        self._keys_BHSE[:, :, start : self._length] = keys_BHSE
        self._values_BHSE[:, :, start : self._length] = values_BHSE
        return self._keys_BHSE[:, :, : self._length], self._values_BHSE[:, :, : self._length]


def _room(buffer: Tensor | None, like_BHSE: Tensor, needed: int) -> Tensor:
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    batch, heads, _, size = like_BHSE.shape
    grown = like_BHSE.new_empty(batch, heads, max(64, 2 * needed), size)
    if buffer is not None:
        grown[:, :, : buffer.shape[2]] = buffer
    return grown


class KVCache:
    """The caches of all layers and the slots they hold. Filled without gradients."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.slots: Slots | None = None

    @property
    def tokens(self) -> int:
        """Tokens cached so far."""
        return 0 if self.slots is None else self.slots.stop

    def extend(self, slots: Slots) -> Slots:
        """Notes that `slots` come next; returns all slots. Called once a pass, before the layers append."""
        self.slots = slots if self.slots is None else self.slots.followed_by(slots)
        return self.slots

    def real_tokens(self) -> Tensor | None:
        """(B,): how many tokens of each row are no padding; None where nothing was padded."""
        if self.slots is None or self.slots.real_BS is None:
            return None
        first_stage_S = self.slots.stage_S == 0
        return torch.sum(self.slots.real_BS[:, first_stage_S], dim=1)
