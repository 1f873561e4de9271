"""`lattice eval`: what it shows, keeps and refuses."""

import json
import logging
import shutil

import pytest

import lattice
from lattice import evaluate
from lattice.registry import lookup
from tests.evaluation.small_runs import QUESTIONS, RECIPE, THINKING, command, train

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'lattice[eval]'")


def test_eval_shows_and_keeps_what_it_found(runs, tasks, tmp_path, capsys):
    out, samples = tmp_path / "found.jsonl", tmp_path / "samples"
    arguments = ["eval", runs["thinking"], "--tasks", "choices", "--include", tasks]
    arguments += ["--thoughts", 0, 2, "--limit", 3, "--out", out, "--samples", samples]
    assert command(*arguments) == 0
    shown = capsys.readouterr()
    assert "choices" in shown.out
    lines = [line for line in shown.err.splitlines() if ", choices: acc" in line]
    assert [line.split(",")[0] for line in lines] == ["thoughts 0", "thoughts 2"], "each as it comes"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["thoughts"] for row in rows] == [0, 2]
    assert all(0 <= row["acc"] <= 1 and "acc_stderr" in row and row["step"] == 4 for row in rows)
    assert all((row["few_shot"], row["questions"]) == (0, 3) for row in rows)
    items = [json.loads(line) for line in (samples / "choices_thoughts2.jsonl").read_text().splitlines()]
    assert len(items) == 3
    assert items[0]["doc"] == QUESTIONS[0]


def test_a_filtered_metric_is_shown_with_its_standard_error(runs, tasks, tmp_path, capsys):
    task = json.loads((tasks / "continue.yaml").read_text()) | {"task": "filtered"}
    task["filter_list"] = [
        {"name": name, "filter": [{"function": "take_first"}]} for name in ("none", "strict")
    ]
    (tmp_path / "filtered.yaml").write_text(json.dumps(task))
    out = tmp_path / "found.jsonl"
    arguments = ["eval", runs["plain"], "--tasks", "filtered", "--include", tmp_path, "--out", out]
    assert command(*arguments, "--set", "evaluators.validation.max_tokens=32") == 0
    (row,) = (row for row in map(json.loads, out.read_text().splitlines()) if row["evaluator"] == "filtered")
    metrics = {"exact_match", "exact_match,strict"}
    assert metrics | {f"{metric}_stderr" for metric in metrics} <= row.keys()
    assert "_stderr" not in capsys.readouterr().out


def curves(folder):
    """The values of each curve in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {name: [point.value for point in board.Scalars(name)] for name in board.Tags()["scalars"]}


def test_tensorboard_keeps_what_earlier_evaluations_found(runs, tasks, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["plain"], folder)
    for shots in (0, 1):
        of_tasks = ["--tasks", "choices", "--include", tasks, "--few-shot", shots]
        assert command("eval", folder, "--limit", 2, *of_tasks) == 0
    assert command("eval", folder, "--limit", 2) == 0
    assert {"choices/0shot/acc", "choices/1shot/acc", "documents/loss"} <= curves(
        folder / "evaluation/limit2"
    ).keys()


def test_figures_of_other_settings_are_told_apart(runs, tmp_path):
    """In their rows, and since one curve holds figures of one text and one way to read it."""
    folder = tmp_path / "run"
    shutil.copytree(runs["plain"], folder, ignore=shutil.ignore_patterns("evaluation*"))
    changes = ["evaluators.validation.max_tokens=64", f"data.megabytes=0.3 # {'../' * 100}"]
    for more in ([], ["--overlap", 3], ["--set", changes[0]], ["--set", *changes]):
        assert command("eval", folder, "--limit", 1, *more) == 0
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["evaluator"] == "validation"]
    assert [row["settings"]["set"] for row in rows] == [[], [], changes[:1], changes]
    assert [row["settings"]["overlap"] for row in rows] == [None, 3, None, None]
    assert {row["settings"]["limit"] for row in rows} == {1}
    folders = sorted((folder / "evaluation").iterdir(), key=lambda path: len(path.name))
    names = ["limit1", "limit1_overlap3", f"limit1_{changes[0]}"]
    assert [path.name for path in folders[:-1]] == names
    assert [curves(path)["validation/loss"] for path in folders] == [
        [pytest.approx(row["loss"])] for row in rows
    ]


def test_all_settings_are_of_one_checkpoint(tmp_path, monkeypatch):
    """Of a run that goes on meanwhile, too."""

    def and_train_on(*arguments, **options):
        subject = right(*arguments, **options)
        train(folder, recurrence=THINKING, run={**RECIPE["run"], "steps": subject.step + 1})
        return subject

    folder, right = train(tmp_path / "run", recurrence=THINKING), evaluate.subject_of
    monkeypatch.setattr(evaluate, "subject_of", and_train_on)
    rows = evaluate.evaluate(folder, evaluate.Wanted(limit=1), thoughts=[0, 1, 2])
    assert {row["step"] for row in rows} == {4}


def test_a_run_that_may_not_be_written_is_evaluated_all_the_same(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs["plain"], folder, ignore=shutil.ignore_patterns("evaluation"))
    (folder / "evaluation").write_text("in the way of the curves, for root too")
    out = tmp_path / "found.jsonl"
    assert command("eval", folder, "--thoughts", 0, "--limit", 1, "--out", out) == 0
    assert "warning: " in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 2
    assert command("eval", folder, "--limit", 1, "--out", folder / "recipe.toml" / "found.jsonl") == 2
    assert "recipe.toml is no directory" in capsys.readouterr().err


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


def test_settings_of_documents_are_heeded_wherever_they_are_said(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["plain"], run)
    said = "evaluators.documents.overlap=40"
    recipe = (run / "recipe.toml").read_text()

    def loss(*arguments):
        out = tmp_path / "found.jsonl"
        assert command("eval", run, "--limit", 1, "--out", out, *arguments) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return [row["loss"] for row in rows if row["evaluator"] == "documents"][-1]

    expected = loss("--overlap", 40)
    assert loss() != expected
    assert loss("--set", said) == expected
    assert loss("--overlap", 3, "--set", said) == expected
    (run / "recipe.toml").write_text(recipe + '\n[evaluators.documents]\nkind = "documents"\noverlap = 40\n')
    assert loss() == expected


def test_settings_reach_every_evaluator_that_has_them(runs, tasks, tmp_path):
    """Under whatever name, the recipe's own and those of --set, but where --set says otherwise."""
    run, out = tmp_path / "run", tmp_path / "found.jsonl"
    shutil.copytree(runs["plain"], run)
    with (run / "recipe.toml").open("a") as file:
        file.write('\n[evaluators."my books"]\nkind = "documents"\nmax_documents = 3\noverlap = 40\n')
        file.write(f'\n[evaluators.asked]\nkind = "lm_eval"\ntasks = "choices"\ninclude = "{tasks}"\n')
    more = f"evaluators.more={{kind='lm_eval', tasks='choices', include='{tasks}', limit=3}}"
    settings = ["--limit", 2, "--overlap", 0, "--batch", 2]
    assert command("eval", run, *settings, "--out", out, "--set", more) == 0
    rows = {row["evaluator"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["my books"]["documents"] == rows["documents"]["documents"] == 2
    assert rows["my books"]["loss"] == rows["documents"]["loss"]
    assert (rows["asked"]["choices/questions"], rows["more"]["choices/questions"]) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "choicez"], "lm-eval has no task 'choicez'; did you mean 'choices'"),
        (["--tasks", "choices", "--limit", "0"], "limit = 0: must be at least 1"),
        (["--no-held-out"], "held_out = False: without tasks there is nothing to evaluate"),
        (["--few-shot", "5"], "few_shot = (5,): is of tasks, and there are none"),
        (["--samples", "s"], "samples = s: is of tasks, and there are none"),
        (["--tasks", "choices", "--overlap", "4"], "overlap = 4: is of held-out text, and there is none"),
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


@pytest.mark.parametrize(
    "impossible",
    [
        ["--tasks", "choicez"],
        ["--tasks", "continue", "choices", "--few-shot", 0, 9],
        ["--set", "evaluators.text={kind='sample', prompt='a'}"],
    ],
)
def test_all_evaluators_and_tasks_are_checked_before_the_first(runs, tasks, tmp_path, impossible):
    out = tmp_path / "found.jsonl"
    include = ["--include", tasks] if "--tasks" in impossible else []
    assert command("eval", runs["plain"], "--limit", 1, "--out", out, *impossible, *include) == 2
    assert not out.exists()


def test_a_run_without_its_tokenizer(tmp_path, capsys):
    """It is not trained again: that would be another one, without a word."""
    backbone = {**RECIPE["backbone"], "vocab_size": 300}
    train(tmp_path / "run", backbone=backbone, tokenizer={"kind": "bpe", "vocab_size": 300})
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    assert command("eval", tmp_path / "run") == 2
    assert "has no tokenizer: restore its directory" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer").exists()


def tokenizer(folder, text):
    """A trained tokenizer; of other texts other ones."""
    shutil.rmtree(folder, ignore_errors=True)
    lookup("tokenizer", "bpe")(vocab_size=270).build(folder, lambda: iter([text * 20]))
    return folder


@pytest.mark.parametrize("kept", [False, True], ids=["gone", "replaced"])
def test_a_checkpoint_is_not_read_with_another_tokenizer(tmp_path, capsys, kept):
    """It would fit the model's table, and give figures and texts."""
    run, named = tmp_path / "run", tokenizer(tmp_path / "named", "one two three four five six seven ")
    backbone = {**RECIPE["backbone"], "vocab_size": 300}
    train(run, backbone=backbone, tokenizer={"kind": "huggingface", "name": str(named)})
    first = lattice.codec_of(run).fingerprint
    tokenizer(named, "the sky is blue and green ")
    shutil.rmtree(run / "tokenizer")
    if kept:
        shutil.copytree(named, run / "tokenizer")
    capsys.readouterr()
    for arguments in (["eval"], ["generate", "--prompt", "a"], ["export", "--to", tmp_path / "out"]):
        assert command(*arguments, run) == 2
        message = capsys.readouterr().err
        assert str(run / "tokenizer" if kept else named) in message
        assert first[:12] in message
    with pytest.raises((ValueError, FileNotFoundError), match=first[:12]):
        lattice.codec_of(run)


def test_lm_eval_says_nothing_that_was_asked_for(runs, tasks, tmp_path, capfd, caplog, monkeypatch):
    """Nor git, nor `datasets`, where stderr is no terminal."""
    monkeypatch.chdir(tmp_path)  # no repository
    caplog.set_level(logging.WARNING)  # lm-eval's own command line, in another test, leaves other levels
    caplog.set_level(logging.NOTSET, logger="lm_eval")
    shutil.copytree(tasks, tmp_path / "tasks")
    for file in (tmp_path / "tasks").glob("*.yaml"):
        task = json.loads(file.read_text()) | {"fewshot_split": "test", "num_fewshot": 2}
        file.write_text(json.dumps(task))
    arguments = ["--tasks", "choices", "--include", tmp_path / "tasks", "--few-shot", 1, "--limit", 1]
    assert command("eval", runs["plain"], *arguments, "--no-held-out", "--out", tmp_path / "found") == 0
    said = capfd.readouterr().err
    assert "choices/1shot: acc " in said
    assert "git" not in said
    assert "Generating" not in said
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
