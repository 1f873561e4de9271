"""Packed tokens against a plain list of the same documents."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lattice.components.data._shards import TokenStream, load_manifest
from lattice.components.data.packed_tokens import PackedTokens
from lattice.components.tokenizer.bytes import BytesCodec
from lattice.prepare import prepare
from lattice.protocols import DataRequest

EOS = 256


def texts(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh "), size=rng.integers(1, 90))) for _ in range(count)]


def flat(documents):
    tokens, numbers = [], []
    for number, text in enumerate(documents):
        ids = [*text.encode(), EOS]
        tokens += ids
        numbers += [number] * len(ids)
    return tokens, numbers


def prepared(folder: Path, documents, **options):
    source = folder.parent / f"{folder.name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare([str(source)], folder, "bytes", show_progress=False, **{"shard_tokens": 500, **options})
    return folder


@pytest.fixture
def folder(tmp_path):
    return prepared(tmp_path / "data", texts())


def request(folder, **changes):
    base = DataRequest(
        codec=BytesCodec(),
        cache=folder.parent / "cache",
        sequence_tokens=16,
        micro_batch=2,
        batch=8,
        documents=True,
        seed=5,
    )
    return dataclasses.replace(base, **changes)


def source(folder, *, options=None, **changes):
    return PackedTokens(path=str(folder), **(options or {})).open(request(folder, **changes))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows(step):
    return [
        (batch.ids_BL[i].tolist(), batch.targets_BL[i].tolist(), batch.documents_BL[i].tolist())
        for batch in step
        for i in range(len(batch.ids_BL))
    ]


def test_stream_reads_across_shards_as_one(folder):
    tokens, numbers = flat(texts())
    stream = TokenStream(folder, load_manifest(folder), "train")
    assert len(stream.shards) > 3
    assert stream.tokens == len(tokens)
    rng = np.random.default_rng(1)
    for a, b in [(0, len(tokens)), *np.sort(rng.integers(0, len(tokens) + 1, (200, 2)), axis=1)]:
        assert stream.read(a, b).tolist() == tokens[a:b]
        assert stream.documents(a, b).tolist() == numbers[a:b]


def test_one_epoch_is_every_sequence_once_packed_as_by_hand(folder):
    tokens, numbers = flat(texts())
    L, cut = 16, len(tokens) - max(17, len(tokens) // 100)
    n = (cut - 1) // L
    expected = {i: (tokens[i * L : i * L + L], tokens[i * L + 1 : i * L + L + 1]) for i in range(n)}
    seen = []
    for step in take(source(folder, batch=2).steps(0), n // 2):
        for batch in step:
            indices = [int(word) for word in batch.identity.split("sequences ")[1].split()]
            for index, (ids, targets, documents) in zip(indices, rows([batch]), strict=True):
                assert (ids, targets) == expected[index]
                assert documents == numbers[index * L : index * L + L]
                seen.append(index)
    assert len(seen) == len(set(seen)) == n - n % 2
    assert seen != sorted(seen)


def test_epochs_and_seeds_differ(folder):
    n = source(folder).position(0)["sequences"]
    first = take(source(folder, batch=1, micro_batch=1).steps(0), 2 * n)
    order = [step[0].identity.split("sequences ")[1] for step in first]
    assert sorted(order[:n]) == sorted(order[n:])
    assert order[:n] != order[n:]
    assert first[n][0].identity.startswith("epoch 1,")
    other = take(source(folder, batch=1, micro_batch=1, seed=6).steps(0), n)
    assert [step[0].identity.split("sequences ")[1] for step in other] != order[:n]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_any_step_equals_going_on(folder, workers):
    whole = [rows(step) for step in take(source(folder).steps(0), 40)]  # into the second epoch
    opened = source(folder, options={"workers": workers})
    for first in (0, 1, 17) if workers else range(38):
        got = [rows(step) for step in take(opened.steps(first), 2)]
        assert got == whole[first : first + 2]
    assert source(folder).position(40)["epoch"] == 1


@pytest.mark.parametrize(("world", "micro"), [(2, 2), (4, 1), (8, 1), (1, 8)])
def test_ranks_divide_the_batch(folder, world, micro):
    whole = [rows(step) for step in take(source(folder).steps(3), 3)]
    parts = [
        take(source(folder, rank=r, world_size=world, micro_batch=micro).steps(3), 3) for r in range(world)
    ]
    for number in range(3):
        assert [row for part in parts for row in rows(part[number])] == whole[number]
        assert all(len(part[number]) == 8 // world // micro for part in parts)


def test_position_ignores_ranks_and_names_the_data(folder, tmp_path):
    alone = source(folder).position(9)
    assert alone == source(folder, rank=1, world_size=2, micro_batch=1).position(9)
    assert json.loads(json.dumps(alone)) == alone
    other = prepared(tmp_path / "other", texts(seed=1))
    assert source(other).position(9)["data"] != alone["data"]


def test_the_global_generator_is_left_alone(folder):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(source(folder).steps(0), 3)
    assert torch.equal(torch.rand(3), expected)


def test_workers_get_the_shards_not_a_copy(folder):
    stream = TokenStream(folder, load_manifest(folder), "train")
    before = stream.read(0, 500).tolist()
    assert len(pickle.dumps(stream)) < 400 * len(stream.shards) + 1000
    assert pickle.loads(pickle.dumps(stream)).read(0, 500).tolist() == before


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("max_tokens", [10, 48, 100, 10**9])
def test_validation_windows_are_spread_over_the_split(tmp_path, world, max_tokens):
    folder = prepared(tmp_path / "data", texts(), validation_fraction=0.2)
    stream = TokenStream(folder, load_manifest(folder), "validation")
    tokens = stream.read(0, stream.tokens).tolist()
    changes = {"world_size": world, "batch": 6 * world}
    ranks = [list(source(folder, rank=r, **changes).validation(max_tokens)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch.ids_BL.shape for batches in ranks for batch in batches} == {(2, 16)}
    in_order = [row for group in zip(*ranks, strict=True) for batch in group for row in rows([batch])]
    ids = [i for row in in_order for i, t in zip(row[0], row[1], strict=True) if t != -100]
    targets = [t for row in in_order for t in row[1] if t != -100]
    count = min(max_tokens, len(tokens) - 1)
    windows, available = -(-count // 16), -(-(len(tokens) - 1) // 16)
    places = [window * available // windows * 16 for window in range(windows)]
    sizes = [min(16, count - window * 16) for window in range(windows)]
    spans = list(zip(places, sizes, strict=True))
    assert ids == [token for place, size in spans for token in tokens[place : place + size]]
    assert targets == [token for place, size in spans for token in tokens[place + 1 : place + size + 1]]
    assert len(ids) == count


def test_validation_bytes_per_token(tmp_path):
    folder = prepared(tmp_path / "data", texts(), validation_fraction=0.2)
    stream = TokenStream(folder, load_manifest(folder), "validation")
    ends = int((stream.read(0, stream.tokens) == EOS).sum())
    assert source(folder).validation_bytes_per_token == (stream.tokens - ends) / stream.tokens


def test_without_a_validation_split_the_end_is_held_out(folder):
    tokens, _ = flat(texts())
    opened = source(folder)
    held = [t for batch in opened.validation(10**9) for t in batch.targets_BL.flatten().tolist() if t != -100]
    assert held == tokens[len(tokens) - len(held) :]
    assert len(held) >= 16
    assert opened.position(0)["sequences"] == (len(tokens) - len(held) - 2) // 16


def test_validation_path(folder, tmp_path):
    other = prepared(tmp_path / "other", ["validate on this text, all of it"])
    opened = source(folder, options={"validation_path": str(other)})
    (batch,) = opened.validation(16)
    assert bytes(batch.ids_BL[0].tolist()) in b"validate on this text, all of it"
    assert opened.position(0)["sequences"] == (len(flat(texts())[0]) - 1) // 16


@pytest.mark.parametrize("again", [".", "../linked"])
def test_validation_path_that_is_the_training_text_holds_its_end_out(again, folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    opened, expected = source(folder, options={"validation_path": str(folder / again)}), source(folder)
    assert opened.fingerprints == expected.fingerprints
    assert opened.position(0) == expected.position(0)


def test_truncated_shard_is_named_with_its_sizes(folder):
    path = folder / "train-00001.bin"
    size = path.stat().st_size
    os.truncate(path, size - 2)
    with pytest.raises(ValueError, match=rf"train-00001\.bin has {size - 2} bytes, must have {size}"):
        source(folder)
    assert PackedTokens(path=str(folder)).problems("bytes")


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx"])
def test_flipped_bit_is_found_also_after_a_good_run(folder, name):
    source(folder)
    path = folder / name
    content = bytearray(path.read_bytes())
    content[16] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        source(folder)


def test_verification_happens_once(folder, monkeypatch):
    from lattice.components.data import _verify

    source(folder)
    monkeypatch.setattr(_verify, "_check", lambda *_: pytest.fail("verified again"))
    source(folder)
    (folder.parent / "cache" / "verified.json").write_text("{damaged")
    monkeypatch.undo()
    source(folder)


def test_id_outside_of_the_vocabulary_is_found_even_unverified(folder):
    path = folder / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[200:202] = (300).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.bin holds id 300 at token 100"):
        source(folder)
    opened = source(folder, options={"verify": False})
    with pytest.raises(ValueError, match="token 100 has id 300"):
        take(opened.steps(0), 40)


def test_another_tokenizer_is_refused_with_both_named(folder):
    codec = BytesCodec()
    codec.fingerprint = "f" * 64
    with pytest.raises(ValueError, match=r"'bytes' \(kind 'bytes', 257 tokens.*ffffffffffff"):
        source(folder, codec=codec)


def test_batches_that_do_not_divide_and_too_little_text(folder, tmp_path):
    with pytest.raises(ValueError, match="batch = 8 sequences: must be a multiple"):
        source(folder, world_size=3)
    small = prepared(tmp_path / "small", ["a" * 60])
    with pytest.raises(ValueError, match="fewer than one batch of 8"):
        source(small)


def test_problems_say_what_to_run(tmp_path, folder):
    missing = PackedTokens(path="data/pile").problems("bytes")
    assert missing == [
        "no prepared data at 'data/pile': run `lattice prepare SOURCE… --tokenizer bytes --out data/pile`"
    ]
    assert PackedTokens(path=str(folder)).problems("bytes") == []
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    assert "version 1" in PackedTokens(path=str(folder)).problems("bytes")[0]
    (folder / "manifest.json").unlink()
    (folder / "progress.json").write_text(
        json.dumps({"settings": {**manifest["settings"], "files": manifest["sources"]}})
    )
    (problem,) = PackedTokens(path=str(folder)).problems("bytes")
    assert "unfinished" in problem
    assert f"lattice prepare {tmp_path / 'data.jsonl'} --out {folder} --tokenizer bytes" in problem
