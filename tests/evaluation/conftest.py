"""Two finished runs, and one lm-eval task of each kind of request."""

import json

import pytest

from tests.evaluation.small_runs import QUESTIONS, TEXTS, THINKING, train


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "plain": train(folder / "plain"),
        "thinking": train(folder / "thinking", recurrence=THINKING),
    }


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    accuracy = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    rolling = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    files = {
        "choices": (
            QUESTIONS,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "options",
                "doc_to_target": "gold",
                "metric_list": accuracy,
            },
        ),
        "rolling": (
            TEXTS,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": rolling,
            },
        ),
        "continue": (
            TEXTS,
            {
                "output_type": "generate_until",
                "doc_to_text": "{{text}}",
                "doc_to_target": "x",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
                "metric_list": exact,
            },
        ),
    }
    for name, (docs, task) in files.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(
            json.dumps({"task": name, **source, "test_split": "test", **task})
        )
    return folder
