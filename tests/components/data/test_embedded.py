from __future__ import annotations

import threading

import pytest

from lattice.components.data.embedded import Embedded
from lattice.components.tokenizer.bytes import BytesCodec
from lattice.protocols import DataRequest


def request(tmp_path):
    return DataRequest(
        codec=BytesCodec(),
        cache=tmp_path,
        sequence_tokens=64,
        micro_batch=2,
        batch=4,
        documents=False,
        seed=0,
    )


def test_is_there_and_tokenized_once(tmp_path):
    data = Embedded(megabytes=0.5)
    assert data.problems("bytes") == []
    first = next(data.open(request(tmp_path)).steps(0))
    made = sorted(tmp_path.glob("embedded-*/*"))
    times = [path.stat().st_mtime_ns for path in made]
    again = next(data.open(request(tmp_path)).steps(0))
    assert first[0].ids_BL.tolist() == again[0].ids_BL.tolist()
    assert times == [path.stat().st_mtime_ns for path in made]
    assert first[0].documents_BL is None


def test_corpus_is_the_training_text_only(tmp_path):
    data = Embedded(megabytes=2.0, validation_fraction=0.2)
    train = list(data.corpus()())
    assert sum(len(text.encode()) for text in train) > 1e6
    held_out = {text for text, out in data._documents() if out}
    assert held_out
    assert not held_out & set(train)
    opened = data.open(request(tmp_path))
    first = next(opened.validation(64)).ids_BL[0].tolist()
    assert any(text.encode().startswith(bytes(first)) for text in held_out)


def test_two_runs_at_once_do_not_collide(tmp_path):
    positions, errors = [], []

    def run():
        try:
            positions.append(Embedded(megabytes=0.3).open(request(tmp_path)).position(0))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(positions) == 4
    assert all(position == positions[0] for position in positions)
    assert len(list(tmp_path.glob("embedded-*"))) == 1


def test_options_are_checked():
    with pytest.raises(ValueError, match="megabytes = 0"):
        Embedded(megabytes=0)
    with pytest.raises(ValueError, match="validation_fraction = 1"):
        Embedded(validation_fraction=1)
