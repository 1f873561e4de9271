"""The whole model on every rank, the batch divided: torch's DistributedDataParallel.

Annotations are not deferred here: torch compares those of a communication hook with its classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lattice.model import LanguageModel, Output
from lattice.protocols import Parallel
from lattice.registry import register
from lattice.spread import Site, Spread


@register("parallel", "ddp")
@dataclass(frozen=True, kw_only=True)
class DDP(Parallel):
    """Every rank holds the whole model; gradients are summed while the backward pass goes on."""

    find_unused_parameters: bool = False
    """For recurrences that leave out some of their own parameters in some steps."""

    def together(self, size: int) -> int:
        return 1

    def spread(self, model: LanguageModel, site: Site) -> Spread:
        if site.world.size == 1:
            return Spread(model)
        return Replicated(model, find_unused=self.find_unused_parameters)


class Replicated(Spread):
    """Gradients summed by torch, in buckets, as they become known."""

    def __init__(self, model: LanguageModel, *, find_unused: bool) -> None:
        super().__init__(model)
        self._module = DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=find_unused
        )
        self._module.register_comm_hook(None, _summed)

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        output: Output = self._module(*args, **kwargs)
        return output

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        with nullcontext() if last else self._module.no_sync():
            yield


def _summed(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The sum, where torch takes the mean: losses are divided by the targets of all ranks already."""
    summing = dist.all_reduce(bucket.buffer(), async_op=True)
    assert summing is not None
    future: torch.futures.Future[Tensor] = summing.get_future().then(lambda done: done.value()[0])
    return future
