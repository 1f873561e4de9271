"""Jobs of several ranks, as processes on this machine that talk over gloo."""

from __future__ import annotations

import multiprocessing
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONTEXT: Any = multiprocessing.get_context("forkserver")
"""Starts a process in milliseconds: they are forked off one that has imported torch already."""
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.checkpoint.hf_storage",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "lattice.state",
        "lattice.components.checkpoint.dcp",
    ]
)


def start(act: Callable[..., None], size: int, *arguments: Any, folder: Path) -> list[Any]:
    """`act(rank, size, *arguments)` in each of `size` processes that have joined one group."""
    meeting = folder / f"meet-{uuid.uuid4().hex}"
    processes = [
        CONTEXT.Process(target=_join, args=(act, rank, size, meeting, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def run(act: Callable[..., None], size: int, *arguments: Any, folder: Path, seconds: float = 60) -> None:
    """As `start`; on return all have ended, and well."""
    processes = start(act, size, *arguments, folder=folder)
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):  # the others may wait for it
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size


def _join(act: Callable[..., None], rank: int, size: int, meeting: Path, arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    act(rank, size, *arguments)
    dist.destroy_process_group()
