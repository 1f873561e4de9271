"""A preparation that is killed, or runs out of disk, and is run again ends with the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lattice.prepare import prepare

OPTIONS = {"validation_fraction": 0.1, "shard_tokens": 50_000}
PROGRAM = """
import json, resource, sys
from pathlib import Path
from lattice.prepare import prepare
sources, out, options, limit = json.loads(sys.argv[1])
import lattice.prepare_encoding
lattice.prepare_encoding.BATCH_DOCUMENTS = 16
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("begin", flush=True)
prepare(sources, Path(out), "bytes", show_progress=False, **options)
"""


def start(sources, out, limit=0):
    arguments = json.dumps([sources, str(out), OPTIONS, limit])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("sources")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdef ü\n", k=rng.randrange(0, 700))) for _ in range(6000)]
    for number in range(2):
        part = texts[number * 2000 : (number + 1) * 2000]
        lines = "".join(json.dumps({"text": text}) + "\n\n" for text in part)
        (folder / f"{number}.jsonl").write_text(lines)
    pq.write_table(pa.table({"text": texts[4000:]}), folder / "2.parquet", row_group_size=300)
    (folder / "3.txt").write_text("the last")
    return [str(folder)]


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(sources, out, "bytes", show_progress=False, **OPTIONS)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_at_random_moments(sources, whole, tmp_path):
    out, rng, stopped_inside = tmp_path / "out", random.Random(1), 0
    for _ in range(4):
        process = start(sources, out)
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.35))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        stopped_inside += (out / "progress.json").exists()
    assert stopped_inside
    prepare(sources, out, "bytes", show_progress=False, **OPTIONS)
    assert contents(out) == whole


def test_stopped_after_every_shard(sources, whole, tmp_path, monkeypatch):
    """Not by chance: an exception right after, and right before, each note in the journal."""
    from lattice.prepare_journal import Journal

    complete, out = Journal.complete, tmp_path / "out"
    for number in range(12):

        def interrupted(self, *arguments, noted=number % 2):
            if noted:
                complete(self, *arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "complete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(sources, out, "bytes", show_progress=False, **OPTIONS)
        assert not list(out.glob("*.partial"))
    monkeypatch.setattr(Journal, "complete", complete)
    prepare(sources, out, "bytes", show_progress=False, **OPTIONS)
    assert contents(out) == whole


def test_full_disk_is_named_and_what_is_complete_is_kept(sources, whole, tmp_path):
    out = tmp_path / "out"
    largest = max(len(content) for name, content in whole.items() if name.endswith(".bin"))
    process = start(sources, out, limit=largest - 2)
    _, error = process.communicate()
    assert process.returncode == 1
    last = error.strip().splitlines()[-1]
    assert "CannotWrite" in last
    assert "train-000" in last
    assert "same command again" in last
    prepare(sources, out, "bytes", show_progress=False, **OPTIONS)
    assert contents(out) == whole


def unfinished(sources, out):
    """A preparation that failed at its last source."""
    bad = out.parent / "z.jsonl"
    bad.write_text("{")
    named = [*sources, str(bad)]
    with pytest.raises(ValueError, match="no JSON"):
        prepare(named, out, "bytes", show_progress=False, **OPTIONS)
    return named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.2}, r"validation_fraction = 0\.1, not 0\.2"),
        ({"text_key": "body"}, "text_key = 'text', not 'body'"),
    ],
)
def test_a_different_command_is_refused(sources, tmp_path, options, message):
    out = tmp_path / "out"
    named = unfinished(sources, out)
    with pytest.raises(ValueError, match=rf"unfinished preparation with {message}.*lattice prepare"):
        prepare(named, out, "bytes", show_progress=False, **{**OPTIONS, **options})


def test_changed_sources_are_refused(sources, tmp_path):
    out = tmp_path / "out"
    named = unfinished(sources, out)
    Path(named[-1]).write_text('{"text": "longer"}')
    with pytest.raises(ValueError, match=r"files = .*z\.jsonl.*'bytes': 1.*'bytes': 18"):
        prepare(named, out, "bytes", show_progress=False, **OPTIONS)


def test_a_missing_shard_is_named(sources, tmp_path):
    out = tmp_path / "out"
    named = unfinished(sources, out)
    (out / "train-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin was complete"):
        prepare(named, out, "bytes", show_progress=False, **OPTIONS)


def test_a_finished_directory_is_reported_and_not_touched(tmp_path, caplog):
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("text")
    first = prepare([str(source)], out, "bytes", show_progress=False)
    before = contents(out)
    assert prepare([str(source)], out, "bytes", show_progress=False) == first
    assert "already prepared" in caplog.text
    assert contents(out) == before
    with pytest.raises(ValueError, match=r"is already prepared with validation_fraction = 0\.0, not 0\.5"):
        prepare([str(source)], out, "bytes", validation_fraction=0.5, show_progress=False)


def test_a_directory_with_other_files_is_refused(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("text")
    with pytest.raises(ValueError, match=r"is not empty \(a\.txt\)"):
        prepare([str(source)], tmp_path, "bytes", show_progress=False)


def test_two_at_once_are_refused(tmp_path):
    from lattice.prepare_journal import opened

    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("text")
    settings = {"sources": ["x"], "tokenizer": "bytes", "validation_fraction": 0, "text_key": "text"}
    with opened(out, settings), pytest.raises(ValueError, match="another `lattice prepare`"):
        prepare([str(source)], out, "bytes", show_progress=False)
