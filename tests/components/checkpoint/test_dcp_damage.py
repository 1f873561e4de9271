"""Damaged, hostile and unfinished checkpoints."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lattice.components.checkpoint._manifest import entries, seal
from lattice.components.checkpoint.dcp import (
    CheckpointError,
    CorruptCheckpoint,
    DcpCheckpoint,
    DcpCheckpointer,
)
from lattice.protocols import Checkpointer

FILES = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "facts.json", "manifest.json"]


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), value), "b": torch.full((3,), value)}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpointer:
    """Steps 1 and 2, whose tensors hold the step."""
    checkpointer = DcpCheckpoint(asynchronous=False).build(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, tensors(step), {"step": step})
    return checkpointer


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_the_files_of_a_checkpoint(saved: Checkpointer, tmp_path: Path) -> None:
    assert sorted(os.listdir(tmp_path / "step-00000002")) == sorted(FILES)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_checkpoint_before_is_loaded(
    saved: Checkpointer, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(tmp_path / "step-00000002" / name)
    into = tensors(0)
    with pytest.raises(CorruptCheckpoint):
        saved.load(tmp_path / "step-00000002", into)
    assert not into["w"].any()
    with pytest.warns(UserWarning, match="step-00000002/.*the checkpoint before it is tried"):
        loaded = saved.load_latest(into)
    assert loaded == (tmp_path / "step-00000001", {"step": 1})
    assert torch.equal(into["w"], tensors(1)["w"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "is not what was written: its checksum differs"),
        (cut_short, r"has \d+ bytes where \d+ were written"),
        (Path.unlink, "is missing"),
    ],
)
def test_the_message_names_the_file(
    saved: Checkpointer, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(tmp_path / "step-00000002" / FILES[0])
    with pytest.raises(CorruptCheckpoint, match=f"step-00000002/{FILES[0]} {words}"):
        saved.load(tmp_path / "step-00000002", tensors(0))


def test_a_run_does_not_start_anew_when_all_are_damaged(saved: Checkpointer, tmp_path: Path) -> None:
    for path in saved.candidates():
        (path / "facts.json").unlink()
    with (
        pytest.warns(UserWarning, match="is missing"),
        pytest.raises(CheckpointError, match="none of the 2 checkpoints"),
    ):
        saved.load_latest(tensors(0))


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_in_the_checkpoint_is_never_executed(
    saved: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exploded = tmp_path / "exploded"
    monkeypatch.setenv("BOMB", str(exploded))
    latest = tmp_path / "step-00000002"
    for name in (".metadata", "__0_0.distcp", "facts.pkl", "model.pt", "pytorch_model.bin"):
        (latest / name).write_bytes(pickle.dumps(Bomb()))
    assert saved.load_latest(tensors(0)) == (latest, {"step": 2})
    for name in FILES:  # in place of the real files, with a manifest that fits
        (latest / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            saved.load(latest, tensors(0))
    (latest / "extra.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        saved.load(latest, tensors(0))
    assert not exploded.exists()
    pickle.loads((latest / "model.pt").read_bytes())  # the bomb is live
    assert exploded.exists()


def test_a_sealed_pickle_is_not_executed_either(
    saved: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    latest = tmp_path / "step-00000002"
    (latest / FILES[0]).write_bytes(pickle.dumps(Bomb()))
    (latest / "manifest.json").unlink()
    seal(latest, 2, entries(latest.iterdir()))
    with pytest.raises(CorruptCheckpoint, match="no safetensors file"):
        saved.load(latest, tensors(0))
    assert not (tmp_path / "exploded").exists()


def test_a_foreign_tensor_file_is_refused(saved: Checkpointer, tmp_path: Path) -> None:
    latest = tmp_path / "step-00000002"
    (latest / "extra.safetensors").write_bytes((latest / FILES[0]).read_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"extra\.safetensors does not belong to the checkpoint"):
        saved.load(latest, tensors(0))


def test_what_a_killed_run_left_is_removed(saved: Checkpointer, tmp_path: Path) -> None:
    (tmp_path / ".writing-step-00000003").mkdir()
    (tmp_path / ".writing-step-00000003" / FILES[0]).write_bytes(b"half")
    (tmp_path / ".removed-step-00000000").mkdir()
    (tmp_path / "step-00000002").rename(tmp_path / ".replaced-step-00000002")  # killed between two renames
    again = DcpCheckpoint().build(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # who only reads leaves a live run's files alone
    assert again.load_latest(tensors(0)) == (tmp_path / "step-00000002", {"step": 2})
    assert again.candidates() == [tmp_path / "step-00000002", tmp_path / "step-00000001"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path, asynchronous: bool) -> None:
    """The kernel refuses to write past a limit on the size of a file."""
    checkpointer = DcpCheckpoint(keep=1, asynchronous=asynchronous).build(tmp_path)
    checkpointer.save(1, tensors(1), {"step": 1})
    checkpointer.wait()
    large = {"w": torch.zeros(1_000_000), "b": torch.zeros(3)}

    def save_and_wait() -> None:
        checkpointer.save(2, large, {})
        checkpointer.wait()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be saved") as raised:
            save_and_wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert raised.value.errno == errno.EFBIG
    assert str(raised.value) == (
        f"checkpoint of step 2 could not be saved: File too large ({tmp_path}); "
        f"the last good one is step 1 in {tmp_path / 'step-00000001'}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpointer.load_latest(tensors(0)) == (tmp_path / "step-00000001", {"step": 1})
    checkpointer.save(3, tensors(3), {"step": 3})  # there is room again
    checkpointer.wait()
    assert checkpointer.latest() == tmp_path / "step-00000003"


def test_a_directory_that_vanishes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "checkpoints"
    checkpointer = DcpCheckpoint(asynchronous=False).build(folder)
    checkpointer.save(1, tensors(1), {})
    shutil.rmtree(folder.parent)
    with pytest.warns(UserWarning, match="run/checkpoints has vanished with its checkpoints"):
        checkpointer.save(2, tensors(2), {})
    assert checkpointer.candidates() == [folder / "step-00000002"]

    def vanish(*arguments: Any) -> None:
        shutil.rmtree(folder.parent)
        seal(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("lattice.components.checkpoint.dcp.seal", vanish)
        with pytest.raises(OSError, match="step 3 could not be saved: No such file") as raised:
            checkpointer.save(3, tensors(3), {})
    assert (raised.value.errno, "no earlier one" in str(raised.value)) == (errno.ENOENT, True)
    with pytest.warns(UserWarning, match="has vanished"):
        checkpointer.save(3, tensors(3), {})
    assert checkpointer.candidates() == [folder / "step-00000003"]


@pytest.mark.parametrize("name", ["../facts.json", "/dev/zero", "facts.json\0", "."])
def test_a_manifest_lists_only_files_beside_it(saved: Checkpointer, tmp_path: Path, name: str) -> None:
    manifest = tmp_path / "step-00000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = content["files"]["facts.json"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(CorruptCheckpoint, match=r"step-00000002/"):
        saved.load(manifest.parent, tensors(0))


def poll_until_it_fails(checkpointer: Checkpointer) -> None:
    assert isinstance(checkpointer, DcpCheckpointer)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        checkpointer.poll()


def test_an_error_surfaces_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer = DcpCheckpoint().build(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("lattice.components.checkpoint.dcp.seal", full)
        expected = r"^checkpoint of step 1 could not be saved: No space left .*; there is no earlier one$"
        for surfacing in (lambda: checkpointer.save(2, tensors(2), {}), checkpointer.wait):
            checkpointer.save(1, tensors(1), {})
            with pytest.raises(OSError, match=expected):
                surfacing()
        checkpointer.save(1, tensors(1), {})
        with pytest.raises(OSError, match=expected):
            poll_until_it_fails(checkpointer)
    checkpointer.save(2, tensors(2), {})
    checkpointer.wait()
    assert checkpointer.latest() == tmp_path / "step-00000002"
