"""The processes of a run, and what they tell each other besides the model's own tensors.

All of it goes through the CPU (gloo): a few numbers a step, so that ranks act alike. R ranks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lattice import messages
from lattice.launch import Agreed, Elsewhere, Launch

T = TypeVar("T")


class Disagreement(Agreed):
    """Ranks are about to do different things."""


class World:
    """One rank's view of all ranks. Every method is called by all of them, in the same order."""

    def __init__(self, launch: Launch | None = None, *, together: int = 1) -> None:
        """`together` neighbouring ranks work on the same sequences."""
        self.launch = launch or Launch()
        self.rank, self.size, self.together = self.launch.rank, self.launch.size, together

    @property
    def data_rank(self) -> int:
        """Which share of the sequences this rank works on."""
        return self.rank // self.together

    @property
    def data_size(self) -> int:
        """In how many shares the sequences are divided."""
        return self.size // self.together

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank; all give as many."""
        mine_N = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return [mine_N.tolist()]
        all_RN = [torch.empty_like(mine_N) for _ in range(self.size)]
        dist.all_gather(all_RN, mine_N)
        return [of_rank.tolist() for of_rank in all_RN]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Summed over the shares of the data: ranks that work together on one count once."""
        return [sum(column) / self.together for column in zip(*self.gather(values), strict=True)]

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Over all ranks, all of which give the same shapes: a number for a scalar, a list for a vector."""
        parts = [value.flatten().tolist() for value in values.values()]
        rows = self.gather(list(itertools.chain.from_iterable(parts)))
        mean_N = torch.tensor(rows, dtype=torch.float64).mean(0)
        split = torch.split(mean_N, [len(part) for part in parts])
        of_names = zip(values.items(), split, strict=True)
        return {name: mean.view(value.shape).tolist() for (name, value), mean in of_names}

    def all(self, value: Any) -> list[Any]:
        """What every rank gives, by rank: what JSON can hold."""
        return [value] if self.size == 1 else messages.gather(value)

    def agree(self, what: str, value: str) -> None:
        """Raises Disagreement, on all ranks, where some rank has another value than rank 0."""
        digest = float(int(hashlib.sha256(value.encode()).hexdigest()[:13], 16))  # exact in 53 bits
        self.same(what, [one for (one,) in self.gather([digest])])

    def same(self, what: str, of_ranks: Sequence[float]) -> None:
        """The same for values that were gathered."""
        others = [str(rank) for rank, one in enumerate(of_ranks) if one != of_ranks[0]]
        if others:
            raise Disagreement(f"rank {', '.join(others)}: {what} is not that of rank 0")

    def from_first(self, call: Callable[[], T]) -> T:
        """What `call` gives on rank 0, which JSON can hold, on all ranks. What it raises there is raised
        there; the others raise Elsewhere."""
        if self.size == 1:
            return call()
        worked, value = False, None
        try:
            if self.rank == 0:
                value, worked = call(), True
        finally:
            worked, value = messages.broadcast([worked, value])
        if not worked:
            raise Elsewhere("rank 0 failed")
        return cast("T", value)

    def in_turn(self, call: Callable[[], T]) -> T:
        """`call` on all ranks: first on rank 0, then on the first of every other host, then on the rest. For
        what leaves files behind that the next ones find. Raises Elsewhere where another rank failed."""
        turn = 0 if self.rank == 0 else 1 if self.launch.local_rank == 0 else 2
        value: list[T] = []
        for now in range(3 if self.size > 1 else 1):
            try:
                if now == turn:
                    value.append(call())
            finally:
                failed = self.gather([now == turn and not value])
            if any(one for (one,) in failed):
                raise Elsewhere(f"rank {failed.index([1.0])} failed")
        return value[0]


@contextmanager
def joined(world: World, device: torch.device, timeout: float) -> Iterator[None]:
    """Connects the ranks, if there are several. An operation that waits for the others fails after twice
    `timeout` seconds: lattice.watch, which says for whom, comes first."""
    if world.size == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=2 * timeout)
    store, rank, size = next(rendezvous("env://", world.rank, world.size, timeout=limit))
    if world.launch.local_size == world.size:
        # torchrun keeps its store when it starts the processes again: the addresses there are of those that
        # died. Several hosts count their attempts each for itself, so that these have no prefix in common:
        # there torchrun must make a new store each time (docs/scaling.md).
        store = dist.PrefixStore(f"attempt {world.launch.attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield
    except RuntimeError as error:
        if (reason := lost(error)) is None:
            raise
        raise ConnectionError(f"lost the other ranks, one of which may tell why: {reason}") from error
    # After a failure the others may be gone, and parting from them could wait for ever.
    dist.destroy_process_group()


def lost(error: RuntimeError) -> str | None:
    """In a line, why the other ranks are out of reach; None for an error that is this rank's own."""
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    if "NCCL error" in text and "ncclRemoteError" not in text:
        return None
    # NCCL begins with where it happened, and ends with why.
    where, _, why = text.partition("Last error:")
    return " ".join([where.splitlines()[0], *why.split()])
