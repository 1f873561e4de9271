"""Latent thoughts: the model's last hidden state is its next input, K times before each prediction.

"Pretraining Language Models with Latent Thoughts" (PonderLM-2, arXiv 2509.23184), section 3. The definition
is sequential: feed the token, feed its hidden state, feed that one's, …; the K-th thought's hidden state
predicts. Training solves the same equations for all tokens at once by Jacobi iteration, which is exact
after K·(L-1) iterations because a thought depends on earlier slots alone.

Shapes: B batch, L tokens, n stages a token, K thoughts, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lattice.cache import KVCache
from lattice.draws import Draw
from lattice.protocols import Initialization, Recurrence, Shape, Unroll, Unrolled
from lattice.registry import register
from lattice.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Jacobi:
    """Number of refinements between the warm start and the final pass (section 3.2)."""

    train: tuple[int, int] = (2, 4)
    """Inclusive range; one count is drawn for each step."""
    eval: int = 3

    def __post_init__(self) -> None:
        low, high = self.train
        if not 0 <= low <= high:
            raise ValueError(f"train = [{low}, {high}]: must be a range [low, high] with 0 <= low <= high")
        if self.eval < 0:
            raise ValueError(f"eval = {self.eval}: must be at least 0")

    def count(self, draw: Draw | None) -> int:
        return self.eval if draw is None else draw.integer("jacobi", *self.train)


@register("recurrence", "latent_thoughts")
@dataclass(frozen=True, kw_only=True)
class LatentThoughts(Recurrence):
    """Hidden states fed back as inputs before each prediction (PonderLM-2)."""

    thoughts: int = 1
    """K, latent thoughts for each token."""
    jacobi: Jacobi = field(default_factory=Jacobi)
    embed_scale: float | None = None
    """Multiplier of the token embeddings; sqrt(2.5 D) if not given, which makes their scale that of the
    normalised thoughts."""

    def __post_init__(self) -> None:
        if self.thoughts < 0:
            raise ValueError(f"thoughts = {self.thoughts}: must be at least 0")
        if self.embed_scale is not None and self.embed_scale <= 0:
            raise ValueError(f"embed_scale = {self.embed_scale}: must be greater than 0")

    @property
    def slots(self) -> int:
        return self.thoughts + 1

    @property
    def parallel_is_exact(self) -> bool:
        return self.thoughts == 0

    def token_passes(self, *, training: bool) -> float:
        if self.thoughts == 0:
            return 1.0
        warm_start = self.thoughts * (self.thoughts + 1) / 2
        iterations = sum(self.jacobi.train) / 2 if training else self.jacobi.eval
        return warm_start + (iterations + 1) * self.slots

    def initialization(self, shape: Shape) -> Initialization:
        std = math.sqrt(2 / (5 * shape.hidden_size))
        return Initialization(
            std=std, residual_std=std / math.sqrt(2 * shape.num_layers * self.slots), truncate=3.0
        )

    def build(self, shape: Shape) -> Unroll:
        scale = math.sqrt(2.5 * shape.hidden_size) if self.embed_scale is None else self.embed_scale
        return Thinking(self.thoughts, self.jacobi, scale)


class Thinking(Unroll):
    def __init__(self, thoughts: int, jacobi: Jacobi, scale: float) -> None:
        self.thoughts = thoughts
        self.jacobi = jacobi
        self.scale = scale

    def __call__(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        token_BL1D = self._embed(stack, ids_BL)
        slots_BLnD = token_BL1D
        for _ in range(self.thoughts):  # warm start: each pass refreshes the thoughts and adds one
            slots_BLnD = torch.cat([token_BL1D, stack.run(slots_BLnD)], dim=2)
        residuals = []
        for _ in range(self.jacobi.count(draw) if self.thoughts else 0):
            thoughts_BLKD = stack.run(slots_BLnD)[:, :, :-1]
            residuals.append(relative_change(slots_BLnD[:, :, 1:], thoughts_BLKD))
            slots_BLnD = torch.cat([token_BL1D, thoughts_BLKD], dim=2)
        hidden_BLnD = stack.run(slots_BLnD, cache=cache)
        telemetry = {"residuals": torch.stack(residuals)} if residuals else {}
        return Unrolled(hidden_BLnD[:, :, -1], telemetry)

    def step(self, stack: Stack, ids_B1: Tensor, cache: KVCache) -> Tensor:
        slot_B11D = self._embed(stack, ids_B1)
        for stage in range(self.thoughts + 1):
            slot_B11D = stack.run(slot_B11D, first_stage=stage, cache=cache)
        return slot_B11D.squeeze(2)

    def _embed(self, stack: Stack, ids_BL: Tensor) -> Tensor:
        return (stack.embed(ids_BL) * self.scale).unsqueeze(2)


@torch.no_grad()
def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Norm of the change of the thoughts over the norm of the thoughts; a scalar, on their device."""
    after = after.float()
    change: Tensor = torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(after)
    return change
