"""A latent thought that keeps what its token is: hidden state and embedding added, at the scale of one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lattice.components.recurrence.latent_thoughts import LatentThoughts, Thinking
from lattice.protocols import Shape, Unroll
from lattice.registry import register
from lattice.stack import Stack


@register("recurrence", "reinjected")
@dataclass(frozen=True, kw_only=True)
class Reinjected(LatentThoughts):
    """Latent thoughts with the embedding of their token added."""

    def build(self, shape: Shape) -> Unroll:
        return _Thinking(self, shape)


class _Thinking(Thinking):
    def __init__(self, options: LatentThoughts, shape: Shape) -> None:
        super().__init__(options, shape)
        self.feedback = self._with_token

    def _with_token(self, stack: Stack, hidden_BLnD: Tensor) -> Tensor:
        return (hidden_BLnD + self._token_BL1D) * math.sqrt(0.5)

    def _embed(self, stack: Stack, ids_BL: Tensor) -> Tensor:
        self._token_BL1D = super()._embed(stack, ids_BL)
        return self._token_BL1D
