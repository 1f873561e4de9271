"""Held-out text by document: each token scored once, whatever the windows."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lattice.components.evaluator.documents import Documents
from lattice.load import load_subject
from tests.evaluation.small_runs import command, train


class Texts:
    """Held-out documents, shorter and longer than a context of 48."""

    def validation_documents(self, most=None):
        return iter([list(range(1, 1 + length)) for length in (130, 3, 1, 48, 49)][:most])


@pytest.mark.parametrize("overlap", [0, 1, 17, 47])
def test_each_token_of_a_document_is_scored_once(runs, overlap):
    subject = replace(load_subject(runs["plain"], device="cpu"), open_source=Texts)
    found = Documents(overlap=overlap, batch=2).evaluate(subject)
    documents = list(Texts().validation_documents())
    assert found["documents"] == len(documents)
    assert found["tokens"] == sum(map(len, documents))
    total = 0.0
    for ids in documents:
        ids = [subject.codec.eos_id, *ids]
        scored = 0
        while scored < len(ids) - 1:  # the same windows, one by one
            start = max(0, scored - overlap)
            stop = min(start + 48, len(ids) - 1)
            with torch.no_grad():
                logs_LV = subject.model(torch.tensor([ids[start:stop]])).logits[0].log_softmax(-1)
            total -= sum(float(logs_LV[at - start, ids[at + 1]]) for at in range(scored, stop))
            scored = stop
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-5)
    size = sum(len(subject.codec.decode(ids).encode()) for ids in documents)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_held_out_documents_are_those_of_the_text(runs):
    """Cut at their ends, none twice, none from the training part."""
    subject = load_subject(runs["plain"], device="cpu")
    documents = list(subject.source.validation_documents())
    assert 0 < len(documents) == len({tuple(ids) for ids in documents})
    assert all(ids and subject.codec.eos_id not in ids for ids in documents)
    assert list(subject.source.validation_documents(2)) == documents[:2]


def test_held_out_text_without_a_whole_document(tmp_path, capsys):
    """Other evaluators read it all the same; whoever asks for documents is told before they do."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "all of one piece " * 200}) + "\n")
    assert (
        command("prepare", tmp_path / "long.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "data") == 0
    )
    run = train(tmp_path / "run", data={"kind": "packed_tokens", "path": str(tmp_path / "data")})
    capsys.readouterr()
    assert command("eval", run) == 0
    assert "warning: no whole document lies in the held-out text" in capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [row["evaluator"] for row in rows] == ["validation"]
    for asked in (["--overlap", 3], ["--set", "evaluators.documents.batch=2"]):
        assert command("eval", run, *asked) == 2
        assert "[evaluators.documents]: no whole document lies in the held-out" in capsys.readouterr().err
    assert (run / "evaluation.jsonl").read_text().count("\n") == 1
