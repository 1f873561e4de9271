"""`prepare` against the documents themselves, and what it says of sources it cannot use."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import zstandard

from lattice import cli
from lattice.components.data._shards import TokenStream, load_manifest
from lattice.prepare import prepare

COMPRESS = {
    "": lambda b: b,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda b: zstandard.compress(b[: len(b) // 2]) + zstandard.compress(b[len(b) // 2 :]),
}
DOCUMENTS = ["Zürich\n", "東京 🙂", "plain", "a\nb", "x" * 300]


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text, "other": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


def run(out, *sources, tokenizer="bytes", **options):
    return prepare([str(s) for s in sources], out, tokenizer, show_progress=False, **options)


def stored(out: Path, split="train") -> list[str]:
    stream = TokenStream(out, load_manifest(out), split)
    text = stream.read(0, stream.tokens)
    ends = np.flatnonzero(text == 256)
    starts = [0, *(ends[:-1] + 1)] if len(ends) else []
    return [bytes(text[a:b].tolist()).decode() for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_in_every_compression(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(DOCUMENTS) + b"\n  \n"))
    manifest = run(tmp_path / "out", path)
    assert stored(tmp_path / "out") == DOCUMENTS
    split = manifest["splits"]["train"]
    assert split["documents"] == len(DOCUMENTS)
    assert split["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert split["tokens"] == split["bytes"] + len(DOCUMENTS)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    noise = np.random.default_rng(0).integers(97, 122, 5000, dtype=np.uint8).tobytes()
    content = COMPRESS[suffix](noise)
    for length in (len(content) - 5, len(content) // 3):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix} is damaged or cut short"):
            run(tmp_path / f"out{length}", path)


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS * 3, "n": range(15)}), path, row_group_size=4)
    run(tmp_path / "out", path)
    assert stored(tmp_path / "out") == DOCUMENTS * 3
    with pytest.raises(ValueError, match=r"a\.parquet: no key 'body'; the keys are 'text', 'n'"):
        run(tmp_path / "other", path, text_key="body")
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: 'text' must be a string, not NoneType"):
        run(tmp_path / "null", path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"a\.parquet is no Parquet file"):
        run(tmp_path / "bad", path)


def test_folders_are_sorted_and_what_is_left_out_is_said(tmp_path, caplog):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "c.jsonl").write_bytes(jsonl(["C"]))
    for name, content in {
        "b/1.md": "B1",
        "a.txt": "A",
        "p.png": "",
        ".git/x.txt": "no",
        ".h.txt": "h",
    }.items():
        (folder / name).write_text(content)
    (folder / "c.jsonl").rename(folder / "c.JSONL.GZ")
    (folder / "c.JSONL.GZ").write_bytes(gzip.compress(jsonl(["C"])))
    os.mkfifo(folder / "pipe.txt")
    single = tmp_path / "named.py"
    single.write_text("print()")
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "out", folder, single)
    assert stored(tmp_path / "out") == ["A", "B1", "C", "print()"]
    for name in ("p.png", ".git/", ".h.txt", "pipe.txt"):
        assert name in caplog.text
    with pytest.raises(ValueError, match=r"pipe\.txt is no regular file"):
        run(tmp_path / "other", folder / "pipe.txt")


def test_empty_documents_are_counted_not_stored(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a", "", "b", ""]))
    manifest = run(tmp_path / "out", path)
    assert stored(tmp_path / "out") == ["a", "b"]
    assert manifest["empty_documents"] == 2
    assert "2 empty documents" in caplog.text
    path.write_bytes(jsonl([""]))
    with pytest.raises(ValueError, match="no text"):
        run(tmp_path / "none", path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_not_utf8_is_named_with_its_offset(tmp_path, suffix):
    good = jsonl(["ü"] * 3)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](good + b'{"text": "ab\xff"}\n'))
    place = f"a.jsonl{suffix}:4: not UTF-8 at byte offset {len(good) + 12}"
    with pytest.raises(ValueError, match=re.escape(place)):
        run(tmp_path / "out", path)
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(COMPRESS[suffix](b"abc\xff"))
    with pytest.raises(ValueError, match="byte offset 3"):
        run(tmp_path / "out2", text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl:3: no JSON record"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:3: no key 'text'; the keys are 'body', 'id'"),
        (b'{"text": 7}', r"a\.jsonl:3: 'text' must be a string, not int"),
        (b'["text"]', r"a\.jsonl:3: must be an object"),
        (rb'{"text": "a\ud800"}', r"a\.jsonl:3: 'text' holds half a surrogate pair at character 1"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["ok"]) + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", path)


def test_sources_that_do_not_exist_or_repeat(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        run(tmp_path / "out", tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="twice"):
        run(tmp_path / "out", path, tmp_path / "." / "a.txt")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"rename it to \.jsonl"):
        run(tmp_path / "out", tmp_path / "a.json")
    with pytest.raises(ValueError, match="no source"):
        run(tmp_path / "out")


def test_hub_dataset(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return [{"text": text} for text in DOCUMENTS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    run(tmp_path / "out", "owner/data:en")
    assert stored(tmp_path / "out") == DOCUMENTS
    assert calls[0] == (("owner/data", "en"), {"split": "train", "streaming": True})


def test_hub_dataset_offline(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"'owner/data' is no file.*no network.*\.parquet or \.jsonl"):
        run(tmp_path / "out", "owner/data")


def test_validation_depends_on_the_text_alone(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts[::-1]))
    run(tmp_path / "a", tmp_path / "a.jsonl", validation_fraction=0.2)
    run(tmp_path / "b", tmp_path / "b.jsonl", validation_fraction=0.2)
    held_out = stored(tmp_path / "a", "validation")
    assert held_out == stored(tmp_path / "b", "validation")[::-1]
    assert 50 < len(held_out) < 110
    assert stored(tmp_path / "a") == [text for text in texts if text not in held_out]


def test_trained_bpe_is_saved_and_opens_again(tmp_path):
    from lattice.components.tokenizer.huggingface import HuggingFaceTokenizer

    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS * 5))
    manifest = run(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=None, train_bpe=280)
    codec = HuggingFaceTokenizer(name=str(tmp_path / "out" / "tokenizer")).build(None)
    assert codec.fingerprint == manifest["tokenizer"]["fingerprint"]
    stream = TokenStream(tmp_path / "out", manifest, "train")
    assert codec.decode(stream.read(0, stream.tokens).tolist()) == "".join(
        f"{text}<|endoftext|>" for text in DOCUMENTS * 5
    )


def test_options_are_checked(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for options, message in [
        ({"tokenizer": None}, "tokenizer: missing"),
        ({"tokenizer": "bpe"}, "no kind of tokenizer knows it"),
        ({"train_bpe": 300}, "cannot be combined"),
        ({"validation_fraction": 1.0}, "validation_fraction = 1.0"),
        ({"shard_tokens": 0}, "shard_tokens = 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", tmp_path / "a.txt", **options)


def test_the_command_says_what_lies_there(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl([*DOCUMENTS * 5, "b"]))
    command = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--validation-fraction", "0.4"])
    assert not stop.value.code
    splits = load_manifest(tmp_path / "out")["splits"]
    for line, (name, split) in zip(capsys.readouterr().out.splitlines(), splits.items(), strict=True):
        assert line.endswith(f"{name}: {split['documents']} documents, {split['tokens']:,} tokens")


def test_nothing_is_left_for_training(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"validation_fraction = 0\.999.* \(1 document\); "):
        run(tmp_path / "out", tmp_path / "a.txt", validation_fraction=0.999)
