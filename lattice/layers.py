"""Consecutive layers of a backbone, over the slots of one pass.

Shapes: B batch, L tokens, n stages a token, r of them read, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from lattice.cache import LayerCache
    from lattice.decoder import Alone, AttentionMask, Block, Rotary

ALL = slice(None)


def as_written(block: Block) -> Callable[..., Tensor]:
    return block


class Layers(NamedTuple):
    """Layers, and the norm after the last one where it is to be applied."""

    blocks: Sequence[Block]
    norm: nn.Module | None

    def __call__(
        self,
        x_BLnD: Tensor,
        rotary: Rotary,
        mask: AttentionMask,
        caches: Sequence[LayerCache | None],
        *,
        read: slice = ALL,
        given: Alone | None = None,
        called: Callable[[Block], Callable[..., Tensor]] = as_written,
    ) -> Tensor:
        """(B, L, r, D): the stages `read`, of which the last layer computes no others. `given` is what the
        first layer makes of the stages before those in `x_BLnD`; `called` says how a layer is called."""
        alone = given
        # By index: layers that share their weights may be one module.
        for index, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            needed = read if index == len(self.blocks) - 1 else ALL
            x_BLnD, alone = called(block)(x_BLnD, rotary, mask, cache, needed, alone), None
        if self.norm is None:
            return x_BLnD
        normed: Tensor = self.norm(x_BLnD)
        return normed
