"""Damaged checkpoints: what was saved, or CheckpointError that names the directory, with nothing changed."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattice.components.checkpoint._manifest import entries, seal
from lattice.components.checkpoint.dcp import CheckpointError, DcpCheckpoint
from tests.fuzz.damage import damaged_bytes, damaged_json

INPUTS = settings(deadline=None, suppress_health_check=list(HealthCheck))
"""As many as the profile says."""
WEIGHTS, FACTS, MANIFEST = "model-00001-of-00001.safetensors", "facts.json", "manifest.json"
FILES = [WEIGHTS, FACTS, MANIFEST, "model.safetensors.index.json"]
SAVED_FACTS = {"step": 2, "data": {"sequence": 5, "seed": 1}, "seconds": 1.5}


def tensors(value: float) -> dict[str, Any]:
    names = {"w": torch.full((4, 3), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}
    return {"model": names, "optimizer": {"step": torch.tensor(value)}}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    leaves = [(one[top][name], other[top][name]) for top in one for name in one[top]]
    return all(torch.equal(a, b) for a, b in leaves)


class Saved:
    """Steps 1 and 2, the second made whole again before each damage."""

    def __init__(self, folder: Path) -> None:
        self.checkpointer = DcpCheckpoint(asynchronous=False).build(folder)
        for step in (1, 2):
            self.checkpointer.save(step, tensors(step), {**SAVED_FACTS, "step": step})
        self.before, self.latest = folder / "step-00000001", folder / "step-00000002"
        self.files = {path.name: path.read_bytes() for path in self.latest.iterdir()}
        assert set(self.files) == set(FILES)

    def damage(self, name: str, content: bytes, *, sealed: bool = False) -> None:
        for file, whole in self.files.items():
            (self.latest / file).write_bytes(whole)
        (self.latest / name).write_bytes(content)
        if sealed:
            (self.latest / MANIFEST).unlink()
            seal(self.latest, 2, entries(list(self.latest.iterdir())))

    def check(self, accepts: Callable[[dict[str, Any], dict[str, Any]], bool]) -> None:
        into, refused = tensors(0), None
        try:
            facts = self.checkpointer.load(self.latest, into)
        except CheckpointError as error:
            refused = str(error)
        if refused is None:
            assert accepts(into, facts)
            return
        assert str(self.latest) in refused
        assert same(into, tensors(0))
        self.check_falls_back()

    def check_falls_back(self) -> None:
        """Or says that it is of another model; nothing else."""
        into, refused = tensors(0), ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = self.checkpointer.load_latest(into)
            except CheckpointError as error:
                refused = str(error)
        if refused:
            assert "is of another model" in refused
            return
        assert loaded == (self.before, {**SAVED_FACTS, "step": 1})
        assert same(into, tensors(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    return Saved(tmp_path_factory.mktemp("checkpoints"))


def as_saved(into: dict[str, Any], facts: dict[str, Any]) -> bool:
    return same(into, tensors(2)) and facts == SAVED_FACTS


@INPUTS
@given(st.data(), st.sampled_from(FILES))
def test_bytes_of_a_file(saved: Saved, data: st.DataObject, name: str) -> None:
    saved.damage(name, data.draw(damaged_bytes(saved.files[name])))
    saved.check(as_saved)


@INPUTS
@given(st.data())
def test_what_the_manifest_says(saved: Saved, data: st.DataObject) -> None:
    changed = data.draw(damaged_json(json.loads(saved.files[MANIFEST])))
    saved.damage(MANIFEST, json.dumps(changed).encode())
    saved.check(as_saved)


@INPUTS
@given(st.data(), st.sampled_from([WEIGHTS, FACTS, "model.safetensors.index.json"]))
def test_broken_files_whose_checksums_fit(saved: Saved, data: st.DataObject, name: str) -> None:
    """As a faulty writer or a hostile one would leave them: refused, or read as what they say."""
    content = saved.files[name]
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(content))
    elif name == WEIGHTS:
        content = with_header(content, data.draw(damaged_json(header(content))))
    else:
        content = json.dumps(data.draw(damaged_json(json.loads(content)))).encode()
    saved.damage(name, content, sealed=True)
    saved.check(lambda into, facts: isinstance(facts, dict) and (name == FACTS or facts == SAVED_FACTS))


def header(content: bytes) -> Any:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def with_header(content: bytes, new: Any) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    written = json.dumps(new).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]
