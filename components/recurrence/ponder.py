"""Pondering: what a pass predicts is added to its input for the next pass.

PonderLM (arXiv 2505.20674): the mixture of embeddings that the model predicts is added to the embedding,
several times, and all tokens go through the model again. `hidden_ponder` adds the hidden state itself.

Shapes: B batch, L tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from lattice.cache import KVCache
from lattice.components.recurrence._feedback import (
    Feedback,
    check_top_k,
    hidden,
    mixture_operations,
    softmax_mixture,
)
from lattice.components.recurrence._scale import check_embed_scale
from lattice.draws import Draw
from lattice.protocols import Initialization, Pass, Recurrence, Shape, Unroll, Unrolled
from lattice.registry import register
from lattice.stack import Stack


@dataclass(frozen=True, kw_only=True)
class _Pondering(Recurrence):
    steps: int = 3
    """Passes before the one that predicts."""
    accumulate: bool = True
    """Add to the last pass's input; if false, to the token's embedding."""
    embed_scale: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps = {self.steps}: must be at least 0")
        check_embed_scale(self.embed_scale)

    def passes(self, shape: Shape, *, training: bool) -> list[Pass]:
        return [Pass(times=self.steps, operations=self.mixing(shape)), Pass()]

    def mixing(self, shape: Shape) -> int:
        """Operations of the feedback, for each token."""
        return 0

    def with_thoughts(self, count: int) -> Recurrence:
        return dataclasses.replace(self, steps=count)

    def initialization(self, shape: Shape) -> Initialization:
        return Initialization.scaled(shape, self.steps + 1)


@register("recurrence", "ponder")
@dataclass(frozen=True, kw_only=True)
class Ponder(_Pondering):
    """Predicted mixtures of embeddings added to the input, pass after pass (PonderLM)."""

    top_k: int | None = None
    """Mix the k likeliest embeddings alone; all if not given."""
    embed_scale: float | None = None
    """Multiplier of the embeddings, in the input and in the mixture; sqrt(D) if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_k(self.top_k)

    def mixing(self, shape: Shape) -> int:
        return mixture_operations(shape, self.top_k)

    def embedding_scale(self, shape: Shape) -> float:
        return self.embed_scale or math.sqrt(shape.hidden_size)

    def build(self, shape: Shape) -> Unroll:
        scale = self.embedding_scale(shape)
        return Pondering(self.steps, scale, softmax_mixture(scale, self.top_k), accumulate=self.accumulate)


@register("recurrence", "hidden_ponder")
@dataclass(frozen=True, kw_only=True)
class HiddenPonder(_Pondering):
    """Hidden states added to the input, pass after pass."""

    embed_scale: float | None = None
    """Multiplier of the token embeddings; 1 if not given."""

    def embedding_scale(self, shape: Shape) -> float:
        return self.embed_scale or 1.0

    def build(self, shape: Shape) -> Unroll:
        return Pondering(self.steps, self.embedding_scale(shape), hidden, accumulate=self.accumulate)


class Pondering(Unroll):
    def __init__(self, steps: int, scale: float, feedback: Feedback, *, accumulate: bool) -> None:
        self.steps, self.scale, self.feedback, self.accumulate = steps, scale, feedback, accumulate

    def __call__(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        token_BL1D = (stack.embed(ids_BL) * self.scale).unsqueeze(2)
        input_BL1D = token_BL1D
        for index in range(self.steps):
            keys = None if cache is None else cache.of_pass(index)
            thought_BL1D = self.feedback(stack, stack.run(input_BL1D, cache=keys))
            input_BL1D = (input_BL1D if self.accumulate else token_BL1D) + thought_BL1D
        keys = None if cache is None else cache.of_pass(self.steps)
        return Unrolled(stack.run(input_BL1D, cache=keys).squeeze(2))
