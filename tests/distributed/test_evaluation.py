"""Evaluators on several ranks: each computes its share, and all know the result of one process.

The weights come from a Hugging Face directory: each rank takes its share of them too."""

import json

import pytest
import yaml
from ranks import metrics, recipe_of, train_on

import lattice
from lattice.hf.export import export

QUESTIONS = [
    {"q": "The sky is", "options": ["blue", "green and wet", "x"], "gold": 0},
    {"q": "Two and two make", "options": ["five", "four"], "gold": 1},
    {"q": "for i in range(10):", "options": ["\n    print(i)", "pass"], "gold": 0},
]
TASKS = {
    "choices": {"output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "gold"},
    "words": {"output_type": "generate_until", "doc_to_target": "{{options[0]}}"},
}
SPREAD = {
    "fsdp": {"kind": "fsdp", "reshard": "pass"},
    "ddp": {"kind": "ddp"},
    "tensor": {"kind": "tensor", "degree": 2},
}


def write_tasks(folder):
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    files = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        extra = {"generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]}} if name == "words" else {}
        table = {"task": name, "doc_to_text": "{{q}}", **files, **task, **extra}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(table))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process and two ranks found, from the same weights."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_tasks(folder / "tasks")
    lattice.train(recipe_of(run={"steps": 2, "seed": 8}), out=folder / "first")
    export(folder / "first", folder / "hf")
    recipe = recipe_of(
        run={"steps": 1, "init_from": str(folder / "hf")},
        evaluators={
            "validation": {"kind": "perplexity", "every": 0, "max_tokens": 200},
            "sequential": {"kind": "perplexity", "every": 0, "max_tokens": 60, "sequential": True},
            "documents": {"kind": "documents", "every": 0, "max_documents": 5},
            "tasks": {"kind": "lm_eval", "tasks": [*TASKS], "include": str(folder / "tasks"), "batch": 2},
        },
    )
    train_on(2, {name: {**recipe, "parallel": table} for name, table in SPREAD.items()}, folder / "two")
    lattice.train(recipe, out=folder / "alone")
    return folder


@pytest.mark.parametrize("name", SPREAD)
def test_figures_are_those_of_one_process(found, name):
    here, there = metrics(found / "alone"), metrics(found / "two" / name)
    assert [row.keys() for row in there] == [row.keys() for row in here]
    for one, other in zip(here, there, strict=True):
        for key in one.keys() - {"tokens_per_second"}:
            assert other[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), key
    expected = {"tasks/choices/acc", "tasks/words/exact_match", "documents/tokens"}
    assert expected <= {key for row in here for key in row}
