"""Cross entropy of the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lattice.protocols import Loss
from lattice.registry import register


@register("loss", "cross_entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross entropy in float32, over chunks of targets so that the logits of all are never held at once."""

    chunk_tokens: int = 4096
    """Targets whose logits are held at once; each chunk's logits are computed again in the backward pass."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {self.chunk_tokens}: must be at least 1")

    def total(
        self, hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        def chunk_loss(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
            return F.cross_entropy(head(hidden_CD).float(), targets_C, reduction="sum")

        count = (targets_N != -100).sum()
        if len(targets_N) <= self.chunk_tokens:
            return chunk_loss(hidden_ND, targets_N), count
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets_N), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            total = total + checkpoint(
                chunk_loss, hidden_ND[chunk], targets_N[chunk], use_reentrant=False, preserve_rng_state=False
            )
        return total, count
