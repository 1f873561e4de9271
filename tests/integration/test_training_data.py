"""Documents, seeds and micro-batches: what a run is made of, and what does not change it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lattice
from lattice.prepare import prepare
from tests.integration.training_runs import rows, steps, stop_at


def test_a_document_does_not_see_the_one_before_it(whole, short_documents):
    """The same weights and batches: the loss of the first step differs by the mask alone."""
    causal = whole(*short_documents)
    document = whole(*short_documents, "mask.kind=document")
    assert len(causal) == len(document)
    assert causal[0]["loss"] == pytest.approx(document[0]["loss"], abs=0.5)
    for key in ("loss", "validation/loss"):
        differing = [a[key] != b[key] for a, b in zip(causal, document, strict=True) if key in a]
        assert all(differing), key


def test_documents_come_back_after_an_interruption(whole, train, short_documents, tmp_path):
    overrides = (*short_documents, "mask.kind=document")
    train(*overrides, *stop_at(3))
    train(*overrides)
    assert rows(tmp_path / "run") == whole(*overrides)


def test_other_data_under_the_same_name_is_refused(place, train, short_documents, tmp_path):
    train(*short_documents, *stop_at(3))
    (place / "other.jsonl").write_text("".join(json.dumps({"text": f"{n} + {n}"}) + "\n" for n in range(900)))
    kept = (place / "short").rename(place / "kept")
    try:
        prepare(
            [str(place / "other.jsonl")],
            place / "short",
            "bytes",
            validation_fraction=0.1,
            show_progress=False,
        )
        with pytest.raises(ValueError, match=r"step-00000003 was made with other data.*--out"):
            train(*short_documents)
    finally:
        shutil.rmtree(place / "short")
        kept.rename(place / "short")
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_weights_and_order_depend_on_the_seed_alone(place, whole, tmp_path):
    lattice.train(place / "tiny.toml", overrides=["run.steps=2", "schedule.kind=wsd"], out=tmp_path / "a")
    lattice.train(place / "tiny.toml", overrides=["run.steps=2", "schedule.kind=wsd"], out=tmp_path / "b")
    lattice.train(
        place / "tiny.toml", overrides=["run.steps=2", "schedule.kind=wsd", "run.seed=4"], out=tmp_path / "c"
    )
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a")[0]["loss"] == whole()[0]["loss"]
    assert rows(tmp_path / "a")[0]["loss"] != rows(tmp_path / "c")[0]["loss"]


def test_accumulation_computes_the_gradient_of_the_whole_batch(whole):
    """Up to the order of the sums: a micro-batch is not a batch."""
    at_once, in_four = whole("run.micro_batch=8", "run.steps=3"), whole("run.micro_batch=2", "run.steps=3")
    for one, four in zip(at_once, in_four, strict=True):
        for key in ("loss", "grad_norm", "validation/loss"):
            assert one.get(key, 0) == pytest.approx(four.get(key, 0), rel=1e-4), key


def test_the_run_directory_says_what_it_ran(train, place, tmp_path):
    train("run.steps=1")
    text = (tmp_path / "run" / "recipe.toml").read_text()
    assert f"torch {torch.__version__}" in text
    assert "\n# commit " in text
    again = lattice.load_recipe(tmp_path / "run" / "recipe.toml")
    assert again.table() == lattice.load_recipe(place / "tiny.toml", ["run.steps=1"]).table()
    assert Path(again.imports[0]).name == "user.py"
