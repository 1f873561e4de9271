"""Pause tokens: copies of one learned embedding after every token, the last of which predicts.

"Think before you speak" (Goyal et al., arXiv 2310.02226), with a pause after every token as in PonderLM-2's
comparison (arXiv 2509.23184). The embedding is a row of the table that no text uses.

Shapes: B batch, L tokens, n stages a token, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lattice.cache import KVCache
from lattice.components.recurrence._scale import check_embed_scale
from lattice.draws import Draw
from lattice.protocols import Initialization, Pass, Recurrence, Shape, Unroll, Unrolled
from lattice.registry import register
from lattice.stack import Stack


@register("recurrence", "pause")
@dataclass(frozen=True, kw_only=True)
class Pause(Recurrence):
    """Learned pause tokens after every token; the last predicts."""

    pauses: int = 1
    """Pause slots after each token."""
    pause_token_id: int | None = None
    """Row of the embedding table that is the pause; the last if not given. No text may use it."""
    embed_scale: float | None = None
    """Multiplier of the embeddings, of tokens and pauses alike; sqrt(D) if not given."""

    def __post_init__(self) -> None:
        if self.pauses < 0:
            raise ValueError(f"pauses = {self.pauses}: must be at least 0")
        if self.pause_token_id is not None and self.pause_token_id < 0:
            raise ValueError(f"pause_token_id = {self.pause_token_id}: must be at least 0")
        check_embed_scale(self.embed_scale)

    @property
    def slots(self) -> int:
        return self.pauses + 1

    def passes(self, shape: Shape, *, training: bool) -> list[Pass]:
        return [Pass(stages=self.slots, read=1)]

    def with_thoughts(self, count: int) -> Recurrence:
        return dataclasses.replace(self, pauses=count)

    def initialization(self, shape: Shape) -> Initialization:
        return Initialization.scaled(shape, self.slots)

    def row(self, shape: Shape) -> int:
        return shape.vocab_size - 1 if self.pause_token_id is None else self.pause_token_id

    def reserved_ids(self, shape: Shape) -> tuple[int, ...]:
        return (self.row(shape),) if self.pauses else ()

    def embedding_scale(self, shape: Shape) -> float:
        return self.embed_scale or math.sqrt(shape.hidden_size)

    def build(self, shape: Shape) -> Unroll:
        row = self.row(shape)
        if row >= shape.vocab_size:
            raise ValueError(
                f"pause_token_id = {row}: must be a row of the embedding table, 0 to {shape.vocab_size - 1}"
            )
        return Pausing(self.pauses, row, self.embedding_scale(shape))


class Pausing(Unroll):
    def __init__(self, pauses: int, row: int, scale: float) -> None:
        self.pauses, self.row, self.scale = pauses, row, scale

    def __call__(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        ids_BL1 = ids_BL.unsqueeze(2)
        pauses_BLK = torch.full_like(ids_BL1, self.row).expand(-1, -1, self.pauses)
        slots_BLnD = stack.embed(torch.cat([ids_BL1, pauses_BLK], dim=2)) * self.scale
        return Unrolled(stack.run(slots_BLnD, read=slice(-1, None), cache=cache).squeeze(2))
