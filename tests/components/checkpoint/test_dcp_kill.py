"""Jobs that are killed at any moment, the midst of a save among them, lose only the steps since their last
checkpoint. `KILLS=50 pytest -s` on this file tries 50 times and prints the counts; without it a few."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import rank_processes
import torch
import torch.distributed as dist

from lattice.components.checkpoint.dcp import DcpCheckpoint


def tensors(value: float) -> dict[str, Any]:
    """On one process."""
    return {
        "model": {str(i): torch.full((6, 20_000), value) for i in range(4)},
        "step": torch.full((), value),
    }


def train(rank: int, size: int, folder: Path, saved: Any) -> None:
    """Without end: a collective as in a step, then a checkpoint. `saved` is the last step that is safe."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (size,))
    state = tensors(0)
    state["model"] = {name: distribute_tensor(w, mesh, [Shard(0)]) for name, w in state["model"].items()}
    checkpointer = DcpCheckpoint(keep=2).build(folder)
    loaded = checkpointer.load_latest(state)
    step = loaded[1]["step"] if loaded else 0
    assert int(state["step"]) == step
    while True:
        step += 1
        dist.all_reduce(torch.ones(1))
        for tensor in [*state["model"].values(), state["step"]]:
            tensor.fill_(step)
        checkpointer.save(step, state, {"step": step})
        checkpointer.poll()
        if rank == 0:
            saved.value = step - 1


def check_whole(folder: Path) -> int:
    """The step of the latest checkpoint, 0 without one; every checkpoint there is must be whole."""
    reader = DcpCheckpoint().build(folder)
    for path in reader.candidates():
        state = tensors(-1)
        step = reader.load(path, state)["step"]  # raises if it is not whole
        assert path.name == f"step-{step:08d}"
        assert all((tensor == step).all() for tensor in [*state["model"].values(), state["step"]])
    latest = reader.latest()
    return int(latest.name.removeprefix("step-")) if latest else 0


def test_a_killed_job_loses_no_checkpoint(tmp_path: Path) -> None:
    chance, counts = random.Random(0), Counter[str]()
    saved = rank_processes.CONTEXT.Value("q", 0)
    folder = tmp_path / "checkpoints"
    trials = int(os.environ.get("KILLS", "6"))
    while counts["trials"] < trials or not counts["while saving"]:
        assert counts["trials"] < 20 * trials
        size, before = chance.choice([1, 2, 2, 4]), saved.value
        processes = rank_processes.start(train, size, folder, saved, folder=tmp_path)
        deadline = time.monotonic() + 60
        while saved.value <= before + 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.2))
        killed = chance.choice([processes, [chance.choice(processes)]])
        for process in killed:
            process.kill()
        unfinished = any(path.name.startswith(".") for path in folder.iterdir())
        for process in processes:  # those that are left must not wait for ever
            process.join(60)
        assert all(process.exitcode for process in processes)
        last = check_whole(folder)
        assert last >= saved.value > before
        counts["trials"] += 1
        counts[f"{len(killed)} of {size} ranks"] += 1
        counts["while saving"] += unfinished
        saved.value = last
    print(dict(counts), f"{saved.value} steps")
