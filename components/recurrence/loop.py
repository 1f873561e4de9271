"""Looping: the residual stream goes through all layers again before the final norm.

The loop baseline of PonderLM-2 (arXiv 2509.23184), after Universal Transformers (arXiv 1807.03819): no norm
and no embedding between the loops, positions unchanged.

Shapes: B batch, L tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from lattice.cache import KVCache
from lattice.components.recurrence._scale import check_embed_scale
from lattice.draws import Draw
from lattice.protocols import Initialization, Pass, Recurrence, Shape, Unroll, Unrolled
from lattice.registry import register
from lattice.stack import Stack


@register("recurrence", "loop")
@dataclass(frozen=True, kw_only=True)
class Loop(Recurrence):
    """The whole stack of layers applied again and again to the residual stream."""

    loops: int = 1
    """Passes through the layers after the first."""
    embed_scale: float | None = None
    """Multiplier of the token embeddings; sqrt(2.5 D) if not given."""

    def __post_init__(self) -> None:
        if self.loops < 0:
            raise ValueError(f"loops = {self.loops}: must be at least 0")
        check_embed_scale(self.embed_scale)

    def passes(self, shape: Shape, *, training: bool) -> list[Pass]:
        return [Pass(times=self.loops + 1)]

    def with_thoughts(self, count: int) -> Recurrence:
        return dataclasses.replace(self, loops=count)

    def initialization(self, shape: Shape) -> Initialization:
        return Initialization.scaled(shape, self.loops + 1)

    def embedding_scale(self, shape: Shape) -> float:
        return self.embed_scale or math.sqrt(2.5 * shape.hidden_size)

    def build(self, shape: Shape) -> Unroll:
        return Looping(self.loops, self.embedding_scale(shape))


class Looping(Unroll):
    def __init__(self, loops: int, scale: float) -> None:
        self.loops, self.scale = loops, scale

    def __call__(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        hidden_BL1D = (stack.embed(ids_BL) * self.scale).unsqueeze(2)
        for index in range(self.loops + 1):
            keys = None if cache is None else cache.of_pass(index)
            hidden_BL1D = stack.run(hidden_BL1D, norm=index == self.loops, cache=keys)
        return Unrolled(hidden_BL1D.squeeze(2))
