"""A run that is killed in the midst of saving, and a run of two ranks; both in processes of their own."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lattice.components.checkpoint import dcp
from lattice.components.checkpoint.dcp import DcpCheckpoint


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts a process in milliseconds: they are forked off one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.checkpoint.hf_storage", "lattice.components.checkpoint.dcp"]
    )
    return context


def tensors(value: float) -> dict[str, Any]:
    return {"model": {str(i): torch.full((50_000,), value) for i in range(6)}, "rng": torch.full((), value)}


def saves_without_end(folder: Path, started: Any) -> None:
    torch.set_num_threads(1)
    checkpointer = DcpCheckpoint(keep=2).build(folder)
    state = tensors(0)
    loaded = checkpointer.load_latest(state)
    step = loaded[1]["step"] if loaded else 0
    started.set()
    while True:
        step += 1
        for tensor in [*state["model"].values(), state["rng"]]:
            tensor.fill_(step)
        checkpointer.save(step, state, {"step": step})


def test_a_killed_run_leaves_its_latest_checkpoint_whole(tmp_path: Path, processes: Any) -> None:
    chance, last, unfinished = random.Random(0), 0, 0
    for _ in range(8):
        started = processes.Event()
        process = processes.Process(target=saves_without_end, args=(tmp_path, started), daemon=True)
        process.start()
        assert started.wait(60)
        time.sleep(chance.uniform(0.05, 0.3))
        process.kill()
        process.join()
        unfinished += any(path.name.startswith(".") for path in tmp_path.iterdir())
        reader = DcpCheckpoint().build(tmp_path)
        latest = reader.latest()
        if latest is None:
            continue
        state = tensors(-1)
        step = reader.load(latest, state)["step"]  # raises if it is not whole
        assert latest.name == f"step-{step:08d}"
        assert all((tensor == step).all() for tensor in [*state["model"].values(), state["rng"]])
        assert step >= last
        last = step
        for path in reader.candidates():
            reader.load(path, state)
    assert last > 8
    assert unfinished >= 3  # the kills did strike while saving


def two_ranks(rank: int, folder: Path, world_size: int) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    mesh = dist.init_device_mesh("cpu", (world_size,))
    whole = torch.arange(15.0).view(5, 3)
    state = {"model": {"w": distribute_tensor(whole, mesh, [Shard(0)])}, "rng": torch.tensor(4.0)}
    checkpointer = DcpCheckpoint(keep=1).build(folder / "checkpoints")
    for step in (1, 2):
        checkpointer.save(step, state, {"step": step})
    checkpointer.wait()
    blank = {
        "model": {"w": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])},
        "rng": torch.zeros(()),
    }
    loaded = checkpointer.load_latest(blank)
    assert loaded is not None
    assert loaded[1] == {"step": 2}
    assert torch.equal(blank["model"]["w"].full_tensor(), whole)
    assert blank["rng"] == 4.0

    if rank == 0:  # what fails on one rank is reported by all
        dcp.seal = None  # type: ignore[assignment]
    checkpointer.save(3, state, {})
    with pytest.raises(OSError, match=r"step 3 could not be saved: .*last good one is step 2"):
        checkpointer.wait()
    dist.destroy_process_group()


def test_two_ranks_write_one_checkpoint_that_one_process_reads(tmp_path: Path, processes: Any) -> None:
    ranks = [processes.Process(target=two_ranks, args=(rank, tmp_path, 2), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    checkpointer = DcpCheckpoint().build(tmp_path / "checkpoints")
    state = {"model": {"w": torch.zeros(5, 3)}, "rng": torch.zeros(())}
    assert checkpointer.load_latest(state) == (tmp_path / "checkpoints" / "step-00000002", {"step": 2})
    assert torch.equal(state["model"]["w"], torch.arange(15.0).view(5, 3))
    assert len(list((tmp_path / "checkpoints" / "step-00000002").glob("shard-*.safetensors"))) == 2
