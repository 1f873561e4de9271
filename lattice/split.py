"""Several ranks that share one sequence: what each computes of it, and what it needs of the others.

Shapes: B batch, H key/value heads, S slots of this rank, K slots of all, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lattice.cache import LayerCache, Pair


@dataclass(frozen=True)
class Split:
    """A sequence divided among the ranks of a group: each has consecutive tokens with all their slots, and in
    attention the keys and values of all."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def part(self, length: int) -> slice:
        """This rank's tokens of `length`. Raises ValueError where these cannot be divided."""
        if length % self.size:
            raise ValueError(
                f"{length} tokens: must be a multiple of the {self.size} ranks that share a sequence"
            )
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    @torch.no_grad()
    def norm(self, norm_B: Tensor) -> Tensor:
        """Of rows, from that of this rank's part of them."""
        square_B = norm_B.square()
        dist.all_reduce(square_B, group=self.group)
        return square_B.sqrt()

    def of_all(self, inner: LayerCache | None) -> LayerCache:
        """A layer's keys and values as the ranks write them, in `inner` if given."""
        return _OfAll(self, inner)


@dataclass(frozen=True)
class _OfAll(LayerCache):
    split: Split
    inner: LayerCache | None

    def append(self, keys_BHSE: Tensor, values_BHSE: Tensor) -> Pair:
        both_2BHSE = torch.stack([keys_BHSE, values_BHSE])
        keys_BHKE, values_BHKE = _Gather.apply(both_2BHSE, self.split).unbind()  # type: ignore[no-untyped-call]
        return (keys_BHKE, values_BHKE) if self.inner is None else self.inner.append(keys_BHKE, values_BHKE)


class _Gather(torch.autograd.Function):
    """All ranks' slots in their order; gradients of a slot are summed over the ranks that looked at it."""

    @staticmethod
    def forward(ctx: Any, mine_2BHSE: Tensor, split: Split) -> Tensor:
        ctx.split = split
        first = mine_2BHSE.movedim(3, 0).contiguous()
        whole = first.new_empty(split.size * first.shape[0], *first.shape[1:])
        dist.all_gather_into_tensor(whole, first, group=split.group)
        return whole.movedim(0, 3)

    @staticmethod
    def backward(ctx: Any, grad_2BHKE: Tensor) -> tuple[Tensor, None]:
        split: Split = ctx.split
        whole = grad_2BHKE.movedim(3, 0).contiguous()
        first = whole.new_empty(whole.shape[0] // split.size, *whole.shape[1:])
        dist.reduce_scatter_tensor(first, whole, group=split.group)
        return first.movedim(0, 3), None
