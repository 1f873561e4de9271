"""A damaged journal of an interrupted preparation: the same bytes as without, or an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattice.prepare import prepare
from lattice.prepare_journal import Journal
from lattice.shard_writer import JOURNAL
from tests.fuzz.damage import damaged_bytes, damaged_json

INPUTS = settings(deadline=None, suppress_health_check=list(HealthCheck))
"""As many as the profile says."""


class Interrupted:
    """A preparation after its second shard, made so again before each damage; and what it would become."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "a.jsonl"
        self.source.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(60)))
        self.out = folder / "out"
        complete, calls = Journal.complete, iter(range(9))

        def interrupted(journal, *arguments):
            complete(journal, *arguments)
            if next(calls) == 1:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Journal, "complete", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.prepare()
        self.half = self.contents()
        self.prepare()
        self.whole = self.contents()

    def prepare(self) -> None:
        options = {"shard_tokens": 200, "validation_fraction": 0.2, "show_progress": False}
        prepare([str(self.source)], self.out, "bytes", **options)

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def check(self, journal: bytes) -> None:
        shutil.rmtree(self.out)
        self.out.mkdir()
        for name, content in {**self.half, JOURNAL: journal}.items():
            (self.out / name).write_bytes(content)
        refused = None
        try:
            self.prepare()
        except ValueError as error:
            refused = str(error)
        if refused is None:
            assert self.contents() == self.whole
        else:
            assert str(self.out / JOURNAL) in refused


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupted]:
    return Interrupted(tmp_path_factory.mktemp("interrupted"))


@INPUTS
@given(st.data())
def test_its_bytes_and_what_it_says(interrupted: Interrupted, data: st.DataObject) -> None:
    whole = interrupted.half[JOURNAL]
    if data.draw(st.booleans()):
        interrupted.check(data.draw(damaged_bytes(whole)))
    else:
        interrupted.check(json.dumps(data.draw(damaged_json(json.loads(whole)))).encode())
