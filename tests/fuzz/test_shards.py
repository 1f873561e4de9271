"""Damaged shards: the same batches as before, or an error that names the directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattice.components.data.packed_tokens import PackedTokens
from lattice.components.tokenizer.bytes import BytesCodec
from lattice.prepare import prepare
from lattice.protocols import DataRequest
from lattice.shard_writer import checksum
from tests.fuzz.damage import damaged_bytes, damaged_json

INPUTS = settings(deadline=None, suppress_health_check=list(HealthCheck))
"""As many as the profile says."""
SHARDS = ["train-00000.bin", "train-00000.idx", "train-00001.bin", "validation-00000.idx"]


class Prepared:
    """A prepared directory, made whole again before each damage."""

    def __init__(self, folder: Path) -> None:
        self.data, self.cache = folder / "data", folder / "cache"
        lines = "".join(json.dumps({"text": f"document {n} " * (n % 5 + 1)}) + "\n" for n in range(40))
        (folder / "a.jsonl").write_text(lines)
        options = {"validation_fraction": 0.3, "shard_tokens": 400, "show_progress": False}
        prepare([str(folder / "a.jsonl")], self.data, "bytes", **options)
        self.files = {path.name: path.read_bytes() for path in self.data.iterdir() if path.is_file()}
        assert {"manifest.json", *SHARDS} <= set(self.files)
        self.whole = self.read(verify=True)
        self.verified = (self.cache / "verified.json").read_bytes()

    def restore(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir()
        for name, content in self.files.items():
            (self.data / name).write_bytes(content)

    def read(self, *, verify: bool) -> list[Any]:
        """All that training and evaluation read."""
        request = DataRequest(
            codec=BytesCodec(),
            cache=self.cache,
            sequence_tokens=16,
            micro_batch=2,
            batch=4,
            documents=True,
            seed=5,
        )
        source = PackedTokens(path=str(self.data), verify=verify).open(request)
        batches = [*next(source.steps(0)), *source.validation(200)]
        return [
            source.validation_bytes_per_token,
            source.fingerprints,
            source.position(0),
            [
                [batch.ids_BL.tolist(), batch.targets_BL.tolist(), batch.documents_BL.tolist()]
                for batch in batches
            ],
            list(islice(source.validation_documents(), 5)),
        ]

    def check(self, *, verify: bool = True) -> None:
        problems = PackedTokens(path=str(self.data)).problems("bytes")
        assert all(str(self.data) in problem for problem in problems), problems
        refused = None
        try:
            read = self.read(verify=verify)
        except (ValueError, OSError) as error:
            refused = str(error)
        if refused is not None:
            assert str(self.data) in refused
            return
        assert not problems
        assert not verify or read == self.whole


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    return Prepared(tmp_path_factory.mktemp("prepared"))


@INPUTS
@given(st.data(), st.sampled_from([*SHARDS, "manifest.json"]), st.booleans())
def test_bytes_of_a_file(prepared: Prepared, data: st.DataObject, name: str, verify: bool) -> None:
    prepared.restore()
    (prepared.data / name).write_bytes(data.draw(damaged_bytes(prepared.files[name])))
    prepared.check(verify=verify)


@INPUTS
@given(st.data(), st.booleans())
def test_what_the_manifest_says(prepared: Prepared, data: st.DataObject, fits: bool) -> None:
    """With the checksum as it was, and with one that fits what is said now."""
    prepared.restore()
    manifest = json.loads(prepared.files["manifest.json"])
    said = {key: manifest[key] for key in ("splits", "dtype", "tokenizer", "checksum", "version")}
    changed = data.draw(damaged_json(said))
    if isinstance(changed, dict):
        changed = {**manifest, **changed}
        if fits:
            changed["checksum"] = checksum(changed)
    (prepared.data / "manifest.json").write_text(json.dumps(changed))
    # A manifest that is consistent in itself may be of other data.
    prepared.check(verify=not fits)


@INPUTS
@given(st.data())
def test_what_is_noted_as_verified(prepared: Prepared, data: st.DataObject) -> None:
    """A damaged note costs a second reading and no more."""
    prepared.restore()
    (prepared.cache / "verified.json").write_bytes(data.draw(damaged_bytes(prepared.verified)))
    assert prepared.read(verify=True) == prepared.whole
