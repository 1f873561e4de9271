"""The plain model: one pass, no thoughts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lattice.cache import KVCache
from lattice.draws import Draw
from lattice.protocols import Initialization, Pass, Recurrence, Shape, Unroll, Unrolled
from lattice.registry import register
from lattice.stack import Stack


@register("recurrence", "none")
@dataclass(frozen=True, kw_only=True)
class NoRecurrence(Recurrence):
    """No thoughts: the plain language model that the others are compared with."""

    initializer_range: float = 0.02
    """Standard deviation of every weight matrix at the start (Hugging Face's default)."""

    def __post_init__(self) -> None:
        if self.initializer_range <= 0:
            raise ValueError(f"initializer_range = {self.initializer_range}: must be greater than 0")

    def passes(self, shape: Shape, *, training: bool) -> list[Pass]:
        return [Pass()]

    def with_thoughts(self, count: int) -> Recurrence:
        if count:
            raise ValueError(f"thoughts = {count}: recurrence 'none' has none; must be 0")
        return self

    def initialization(self, shape: Shape) -> Initialization:
        return Initialization(std=self.initializer_range, residual_std=self.initializer_range)

    def build(self, shape: Shape) -> Unroll:
        return OnePass()


class OnePass(Unroll):
    def __call__(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        slots_BL1D = stack.embed(ids_BL).unsqueeze(2)
        return Unrolled(stack.run(slots_BL1D, cache=cache).squeeze(2))
