"""Latent thoughts: the model's last hidden state is its next input, K times before each prediction.

"Pretraining Language Models with Latent Thoughts" (PonderLM-2, arXiv 2509.23184), section 3. The definition
is sequential: feed the token, feed its hidden state, feed that one's, …; the K-th thought's hidden state
predicts. Training solves the same equations for all tokens at once, which works because a thought depends on
earlier slots alone; the solvers are in `_solvers.py`.

Shapes: B batch, L tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lattice.cache import KVCache
from lattice.components.recurrence._convergence import check_grad_passes, check_tolerance
from lattice.components.recurrence._feedback import (
    Feedback,
    FeedbackName,
    check_top_k,
    hidden,
    mixture_operations,
    softmax_mixture,
)
from lattice.components.recurrence._iterations import GaussSeidel, Iterations, Jacobi
from lattice.components.recurrence._scale import check_embed_scale
from lattice.components.recurrence._solvers import SOLVERS, Problem
from lattice.draws import Draw
from lattice.protocols import Initialization, Pass, Recurrence, Shape, Unroll, Unrolled
from lattice.registry import register
from lattice.stack import Stack


@register("recurrence", "latent_thoughts")
@dataclass(frozen=True, kw_only=True)
class LatentThoughts(Recurrence):
    """Hidden states fed back as inputs before each prediction (PonderLM-2)."""

    thoughts: int = 1
    """K, latent thoughts for each token."""
    feedback: FeedbackName = "hidden"
    """What a thought is: the hidden state, or the mixture of embeddings that it predicts."""
    top_k: int | None = None
    """With softmax feedback, mix the k likeliest embeddings alone; all if not given."""
    solver: Literal["jacobi", "gauss_seidel"] = "jacobi"
    """How the thoughts of all tokens are found at once."""
    jacobi: Jacobi = field(default_factory=Jacobi)
    """Refinements of the solver of that name."""
    gauss_seidel: GaussSeidel = field(default_factory=GaussSeidel)
    """Further sweeps of the solver of that name."""
    tolerance: float | None = None
    """Stop, at evaluation and prefill, when the thoughts change by less, relatively; `eval` is the limit."""
    grad_passes: int | None = None
    """Gradients flow through the last n passes (sweeps) alone; through all if not given."""
    position_ids: Literal["shared", "fresh"] = "shared"
    """All slots of a token share its position, as in the paper, or each has its own."""
    embed_scale: float | None = None
    """Multiplier of the token embeddings; if not given sqrt(2.5 D), which makes their scale that of the
    normalised thoughts, and sqrt(D) with softmax feedback."""

    def __post_init__(self) -> None:
        if self.thoughts < 0:
            raise ValueError(f"thoughts = {self.thoughts}: must be at least 0")
        if self.top_k is not None and self.feedback != "softmax":
            raise ValueError(f"top_k = {self.top_k}: has no effect with feedback = '{self.feedback}'")
        check_top_k(self.top_k)
        check_tolerance(self.tolerance)
        check_grad_passes(self.grad_passes)
        check_embed_scale(self.embed_scale)

    @property
    def iterations(self) -> Iterations:
        """Those of the solver in use."""
        return self.jacobi if self.solver == "jacobi" else self.gauss_seidel

    @property
    def slots(self) -> int:
        return self.thoughts + 1

    @property
    def positions(self) -> int:
        return self.slots if self.position_ids == "fresh" else 1

    @property
    def parallel_is_exact(self) -> bool:
        return self.thoughts == 0

    @property
    def rows_may_branch(self) -> bool:
        return self.tolerance is None

    def passes(self, shape: Shape, *, training: bool) -> list[Pass]:
        if self.thoughts == 0:
            return [Pass()]
        solver, mixing = SOLVERS[self.solver], self._mixing(shape)
        cut = self.grad_passes if training else None
        return [
            dataclasses.replace(one, times=share)
            for count, share in self.iterations.shares(training=training).items()
            for one in solver.passes(self.thoughts, count, cut, mixing)
        ]

    def decode_passes(self, shape: Shape) -> list[Pass]:
        mixing = self._mixing(shape)
        thought, last = (Pass(keys=self.slots, operations=operations) for operations in (mixing, 0))
        return [thought] * self.thoughts + [last]

    def _mixing(self, shape: Shape) -> int:
        return mixture_operations(shape, self.top_k) if self.feedback == "softmax" else 0

    def with_thoughts(self, count: int) -> Recurrence:
        return dataclasses.replace(self, thoughts=count)

    def initialization(self, shape: Shape) -> Initialization:
        return Initialization.scaled(shape, self.slots)

    def embedding_scale(self, shape: Shape) -> float:
        return self.embed_scale or math.sqrt((1 if self.feedback == "softmax" else 2.5) * shape.hidden_size)

    def build(self, shape: Shape) -> Unroll:
        return Thinking(self, shape)


class Thinking(Unroll):
    def __init__(self, options: LatentThoughts, shape: Shape) -> None:
        softmax = options.feedback == "softmax"
        self.options = options
        self.scale = options.embedding_scale(shape)
        self.feedback: Feedback = softmax_mixture(self.scale, options.top_k) if softmax else hidden

    def __call__(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        options = self.options
        problem = Problem(
            thoughts=options.thoughts,
            feedback=self.feedback,
            count=options.iterations.count(draw) if options.thoughts else 0,
            tolerance=options.tolerance if draw is None else None,
            grad_passes=options.grad_passes,
        )
        return SOLVERS[options.solver].solve(problem, stack, self._embed(stack, ids_BL), cache)

    def step(self, stack: Stack, ids_B1: Tensor, cache: KVCache) -> Tensor:
        slot_B11D = self._embed(stack, ids_B1)
        for stage in range(self.options.thoughts):
            slot_B11D = self.feedback(stack, stack.run(slot_B11D, first_stage=stage, cache=cache))
        return stack.run(slot_B11D, first_stage=self.options.thoughts, cache=cache).squeeze(2)

    def _embed(self, stack: Stack, ids_BL: Tensor) -> Tensor:
        return (stack.embed(ids_BL) * self.scale).unsqueeze(2)
