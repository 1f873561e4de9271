"""A preparation that is killed, or runs out of disk, and is run again ends with the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lattice import prepare_encoding
from lattice.components.tokenizer.bytes import BytesCodec, BytesTokenizer
from lattice.documents import Place
from lattice.prepare import prepare
from lattice.prepare_encoding import AHEAD, Encoder, encoded_documents
from lattice.text_sources import Record, TextSource

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
else:  # slowly, or a fast machine is done before it is killed
    import time, lattice.prepare
    encoded = lattice.prepare.encoded_documents
    lattice.prepare.encoded_documents = lambda *a, **k: (time.sleep(0.001) or one for one in encoded(*a, **k))
print("begin", flush=True)
prepare(sources, Path(out), "bytes", show_progress=False, **options)
"""


def start(sources, out, limit=0, workers=0):
    arguments = json.dumps([sources, str(out), {**OPTIONS, "workers": workers}, limit])
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


def worker_processes(process) -> list[psutil.Process]:
    """Children of the server that they are forked from, which is a child of the main process."""
    return [worker for server in psutil.Process(process.pid).children() for worker in server.children()]


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_at_random_moments(sources, whole, tmp_path):
    """The last time with workers, which do not outlive their main process."""
    out, rng, stopped_inside = tmp_path / "out", random.Random(1), 0
    for number in (0, 0, 2):
        process = start(sources, out, workers=number)
        process.stdout.readline()
        if number:
            wait_until(lambda process=process: worker_processes(process))
            workers = worker_processes(process)
        time.sleep(rng.uniform(0.0, 0.35))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        stopped_inside += (out / "progress.json").exists()
    assert stopped_inside
    wait_until(lambda: not any(worker.is_running() for worker in workers))
    prepare(sources, out, "bytes", show_progress=False, **OPTIONS)
    assert contents(out) == whole


def test_the_number_of_workers_does_not_matter(sources, whole, tmp_path, monkeypatch):
    """Nor does where batches end. What is wrong is said in its place, after all before it is done."""
    monkeypatch.setattr(prepare_encoding, "BATCH_DOCUMENTS", 40)
    prepare(sources, tmp_path / "two", "bytes", workers=2, show_progress=False, **OPTIONS)
    assert contents(tmp_path / "two") == whole
    bad = tmp_path / "z.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 7}\n')
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        with pytest.raises(ValueError, match=r"z\.jsonl:2: 'text' must be a string, not int"):
            prepare([*sources, str(bad)], out, "bytes", workers=workers, show_progress=False, **OPTIONS)
        done = {name: content for name, content in contents(out).items() if name.endswith(".bin")}
        assert len(done) >= 4
        assert done.items() <= whole.items()


class Endless(TextSource):
    """Records without end; counts those that were asked for."""

    read = 0

    def records(self, skip):
        for _ in itertools.count():
            Endless.read += 1
            yield Record("x" * 100)


def test_reading_runs_only_so_far_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_encoding, "BATCH_DOCUMENTS", 10)
    encoder = Encoder([Endless("endless", None)], BytesCodec(), 0.0)
    stream = encoded_documents(encoder, Place(0, 0), workers=0, maker=BytesTokenizer(), folder=tmp_path)
    for taken in range(1, 500):
        next(stream)
        assert Endless.read <= taken + 10 * (2 * AHEAD + 3)
    stream.close()


def test_a_worker_that_was_killed_is_said(tmp_path):
    encoder = Encoder([Endless("endless", None)], BytesCodec(), 0.0)
    stream = encoded_documents(encoder, Place(0, 0), workers=1, maker=BytesTokenizer(), folder=tmp_path)
    assert len(next(stream).ids) == 100
    for worker in worker_processes(psutil.Process(os.getpid())):
        worker.kill()
    with pytest.raises(ValueError, match=r"a worker process ended unexpectedly.*same command again"):
        sum(1 for _ in stream)


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


def test_sources_that_were_read_and_have_changed_are_refused(sources, tmp_path):
    out, first = tmp_path / "out", tmp_path / "a.jsonl"
    first.write_text(json.dumps({"text": "x" * 60_000}))
    named = unfinished([str(first), *sources], out)
    first.write_text('{"text": "shorter"}')
    with pytest.raises(ValueError, match=r"files = .*a\.jsonl.*'bytes': 60012.*'bytes': 19"):
        prepare(named, out, "bytes", show_progress=False, **OPTIONS)


def test_a_source_that_is_mended_goes_on(sources, tmp_path, caplog, monkeypatch):
    """With all that was complete, and what was read of it before its mistake as it was."""
    monkeypatch.setattr(prepare_encoding, "BATCH_DOCUMENTS", 16)
    out, last = tmp_path / "out", tmp_path / "y.jsonl"
    good = [json.dumps({"text": f"{number} " * 100}) for number in range(300)]
    last.write_text("\n".join([*good, "{", good[0]]))
    with pytest.raises(ValueError, match=r"y\.jsonl:301"):
        prepare([*sources, str(last)], out, "bytes", show_progress=False, **OPTIONS)
    last.write_text("\n".join([*good, '{"text": "mended"}', good[0]]))
    prepare([*sources, str(last)], out, "bytes", show_progress=False, **OPTIONS)
    assert re.search(r"y\.jsonl has changed: its first \d+ documents are kept as they were read", caplog.text)
    prepare([*sources, str(last)], tmp_path / "whole", "bytes", show_progress=False, **OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")


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
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"], "no lock stays in it"


def test_two_at_once_are_refused(tmp_path):
    from lattice.prepare_journal import opened

    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("text")
    settings = {"sources": ["x"], "tokenizer": "bytes", "validation_fraction": 0, "text_key": "text"}
    with opened(out, settings), pytest.raises(ValueError, match="another `lattice prepare`"):
        prepare([str(source)], out, "bytes", show_progress=False)
