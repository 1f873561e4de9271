"""What fails on one rank fails on all, at the same call, and what one rank finds all take."""

from __future__ import annotations

import ctypes
import errno
import resource
import signal
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import rank_processes
import torch
import torch.distributed as dist

from lattice.components.checkpoint import _folder, _manifest, dcp
from lattice.components.checkpoint._manifest import entries, seal
from lattice.components.checkpoint.dcp import CorruptCheckpoint, DcpCheckpoint, DcpCheckpointer


def sharded(value: float) -> dict[str, Any]:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.full((5, 60_000), value)
    return {"model": {"w": distribute_tensor(whole, mesh, [Shard(0)])}, "step": torch.tensor(value)}


def agreed(value: Any) -> Any:
    """What all ranks have; fails where they have different things."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert values == values[:1] * len(values)
    return value


def polls_until_failure(checkpointer: DcpCheckpointer, rank: int) -> tuple[int, str]:
    """A training loop whose ranks are not in step, but for its collectives."""
    for number in range(10_000):
        time.sleep(0.001 * rank)
        dist.all_reduce(torch.ones(1))
        try:
            checkpointer.poll()
        except OSError as error:
            return number, str(error)
    raise AssertionError("the failure did not surface")


def a_full_disk_on_one_rank(checkpointer: DcpCheckpointer, rank: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    checkpointer.save(3, sharded(3), {"step": 3})
    _, message = agreed(polls_until_failure(checkpointer, rank))
    assert "step 3 could not be saved: File too large" in message
    assert "the last good one is step 2 in" in message
    for call in (checkpointer.wait, lambda: checkpointer.save(4, sharded(4), {})):
        checkpointer.save(3, sharded(3), {"step": 3})
        with pytest.raises(OSError, match="step 3 could not be saved") as raised:
            call()
        assert agreed(raised.value.errno) == errno.EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def a_directory_that_rank_0_cannot_use(checkpointer: DcpCheckpointer, rank: int) -> None:
    failing = OSError(errno.EROFS, "Read-only file system", "there")
    expected = "step 3 could not be saved: Read-only file system"
    broken = mock.patch.object(_folder, "clean", side_effect=failing)
    with broken, pytest.raises(OSError, match=expected) as raised:
        checkpointer.save(3, sharded(3), {})
    agreed(str(raised.value))
    with mock.patch.object(dcp, "seal", side_effect=failing):
        checkpointer.save(3, sharded(3), {})
        with pytest.raises(OSError, match=expected) as raised:
            checkpointer.wait()
    agreed(str(raised.value))


def every_file_is_hashed_once(checkpointer: DcpCheckpointer, rank: int) -> None:
    """By the rank that wrote it, and once more when it is loaded."""
    shards = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    with mock.patch.object(_manifest, "_sha256", wraps=_manifest._sha256) as hashes:
        checkpointer.save(3, sharded(3), {"step": 3})
        checkpointer.wait()
        mine = [call.args[0].name for call in hashes.mock_calls]
        assert mine == [["facts.json", shards[0]], [shards[1]]][rank]
        hashes.reset_mock()
        assert load(checkpointer) == ("step-00000003", 0)
        found: list[Any] = [None, None]
        dist.all_gather_object(found, [call.args[0].name for call in hashes.mock_calls])
        assert sorted(found[0] + found[1]) == ["facts.json", *shards]


def load(checkpointer: DcpCheckpointer) -> tuple[str, int]:
    """The name of what was loaded, and how many warnings all ranks gave."""
    state = sharded(-1)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        found = checkpointer.load_latest(state)
    assert found is not None
    step = float(found[1]["step"])
    assert (state["model"]["w"].full_tensor() == step).all()
    assert state["step"] == step
    total = torch.tensor(len([one for one in given if "is tried" in str(one.message)]))
    dist.all_reduce(total)
    return agreed(found[0].name), int(total)


def all_at_once(rank: int, size: int, folder: Path) -> None:
    checkpointer = DcpCheckpoint(keep=3).build(folder)
    assert isinstance(checkpointer, DcpCheckpointer)
    for step in (1, 2):
        checkpointer.save(step, sharded(step), {"step": step if rank == 0 else "not rank 0's"})
    with pytest.raises(ValueError, match=r"save different steps: \[5, 6\]"):
        checkpointer.save(5 + rank, sharded(0), {})
    assert load(checkpointer) == ("step-00000002", 0)

    a_full_disk_on_one_rank(checkpointer, rank)
    a_directory_that_rank_0_cannot_use(checkpointer, rank)
    every_file_is_hashed_once(checkpointer, rank)

    if rank == 1:  # what it does not see yet
        mock.patch.object(_folder, "candidates", return_value=[]).start()
    assert len(agreed(checkpointer.candidates())) == 3
    read = dcp.prepare_reading

    def broken(path: Path, tensors: dict[str, Any]) -> Any:
        if path.name == "step-00000003":
            raise CorruptCheckpoint("unreadable here")
        return read(path, tensors)

    with mock.patch.object(dcp, "prepare_reading", broken if rank == 1 else read):
        assert load(checkpointer) == ("step-00000002", 1)
    if rank == 0:
        path = folder / "step-00000003" / "shard-00002-model-00001-of-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    assert load(checkpointer) == ("step-00000002", 1)


def test_ranks_agree(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    rank_processes.run(all_at_once, 2, folder, folder=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in (1, 2, 3)]

    latest, reader = folder / "step-00000002", DcpCheckpoint().build(folder)
    for name in ("manifest.json", "shard-00001-model-00001-of-00001.safetensors"):
        (latest / name).unlink()
    seal(latest, 2, entries(latest.iterdir()))  # as if there had never been a first shard
    with pytest.raises(CorruptCheckpoint, match=r"holds 120000 of the 300000 elements of model\.w"):
        reader.load(latest, {"model": {"w": torch.zeros(5, 60_000)}})


FORBIDDEN = 77


def in_a_small_file_system(rank: int, size: int, folder: Path) -> None:
    """A disk of 2 MB that only this process sees: it fills up, is set read-only, and vanishes."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        raise SystemExit(FORBIDDEN)

    def mount(*options: str) -> None:
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            raise SystemExit(FORBIDDEN)

    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    checkpointer = DcpCheckpoint(keep=1, asynchronous=False).build(folder / "run" / "checkpoints")
    small = {"w": torch.ones(1000)}

    def fails(number: int, tensors: dict[str, torch.Tensor]) -> None:
        with pytest.raises(OSError, match=r"could not be saved.*the last good one is step 1") as raised:
            checkpointer.save(2, tensors, {})
        assert raised.value.errno == number
        assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-00000001"]
        assert checkpointer.load_latest({"w": torch.zeros(1000)}) is not None

    checkpointer.save(1, small, {})
    fails(errno.ENOSPC, {"w": torch.ones(1_000_000)})
    mount("-o", "remount,ro", str(folder))
    fails(errno.EROFS, small)
    mount("-o", "remount,rw", str(folder))
    checkpointer.save(2, small, {})
    assert checkpointer.latest() == folder / "run" / "checkpoints" / "step-00000002"
    subprocess.run(["umount", str(folder)], check=True)
    with pytest.warns(UserWarning, match="run/checkpoints has vanished with its checkpoints: made anew"):
        checkpointer.save(3, small, {})
    assert checkpointer.candidates() == [folder / "run" / "checkpoints" / "step-00000003"]


def test_a_disk_that_fills_up_is_read_only_and_vanishes(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (process,) = rank_processes.start(in_a_small_file_system, 1, tmp_path / "disk", folder=tmp_path)
    process.join(60)
    if process.exitcode == FORBIDDEN:
        pytest.skip("this machine forbids a process a file system of its own (mount namespaces)")
    assert process.exitcode == 0
