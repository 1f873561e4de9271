"""Studies: arms at equal cost, their runs, and what is said of them."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lattice.compare import Group, Run, check_comparable, families_of, find_runs, groups_of
from lattice.compare_report import COUNTED, _differences, _scaled, report
from lattice.ledger import ledger
from lattice.pictures import _curves, curves
from lattice.recipe import RecipeError, load_recipe
from lattice.run_folder import RunExists, locked
from lattice.study import QUANTITIES, read_study
from lattice.sweep import jobs_of, sweep
from tests.evaluation.small_runs import RECIPE, THINKING, command, train

pytestmark = pytest.mark.usefixtures("own_cache")
HEADS = "backbone.num_attention_heads"
LATENT = {"recurrence": {"kind": "latent_thoughts", "thoughts": 1}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(tomli_w.dumps(RECIPE))


def write(tmp_path, arms, **study):
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps({"study": {"base": "base.toml", **study}, "arms": arms}))
    return path


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("quantity", "times", "by"),
    [
        ("inference_flops", 1.0, ["backbone.num_hidden_layers"]),
        ("training_flops", 1.0, ["run.steps"]),
        ("training_flops", 0.4, ["run.steps"]),
        ("layer_parameters", 2.0, ["backbone.num_hidden_layers"]),
        ("parameters", 3.0, ["backbone.hidden_size", "backbone.intermediate_size", HEADS]),
    ],
)
def test_a_match_is_as_near_as_whole_numbers_come(tmp_path, quantity, times, by):
    match = {"quantity": quantity, "times": times, "of": "latent", "by": by}
    study = read_study(write(tmp_path, {"matched": {"match": match}, "latent": LATENT}))
    matched, latent = study.arms
    assert [arm.name for arm in study.arms] == ["matched", "latent"]  # in the order of the file
    measure = QUANTITIES[quantity]
    target = times * measure(latent.recipe, ledger(latent.recipe))
    reached = measure(matched.recipe, ledger(matched.recipe)) / target

    base = RECIPE["run"] | RECIPE["backbone"]
    unit = math.gcd(*(base[key.split(".")[1]] for key in by))
    for one in (-1, 1):  # neither a step more nor a step less is nearer
        settings = []
        for key in by:
            table, name = key.split(".")
            settings.append(f"{key}={matched.recipe.table()[table][name] + one * base[name] // unit}")
        other = load_recipe(matched.recipe, settings)
        away = measure(other, ledger(other)) / target
        assert abs(math.log(reached)) <= abs(math.log(away))
    assert f"{quantity} {reached:.3f}" in matched.matched
    assert matched.recipe.component("recurrence") != latent.recipe.component("recurrence")


def test_double_depth_of_one_thought(tmp_path):
    match = {"quantity": "inference_flops", "of": "latent", "by": ["backbone.num_hidden_layers"]}
    study = read_study(write(tmp_path, {"latent": LATENT, "deep": {"match": match}}))
    layers = study.arms[1].recipe.component("backbone").num_hidden_layers
    assert layers in (4, 5)  # twice the base's two; its cache is shorter


@pytest.mark.parametrize(
    ("arms", "messages"),
    [
        ({}, ["there are no arms"]),
        ({"a": {"backbone": {"hiden_size": 8}}}, ["arm 'a': study.toml:", "hiden_size", "hidden_size"]),
        ({"a": {"run": {"seed": 3}}}, ["arms.a sets run.seed, which all arms share"]),
        ({"a": {"data": {"kind": "embedded"}}}, ["arms.a sets data, which all arms share"]),
        ({"a": {"extends": ["x.toml"]}}, ["arms.a has 'extends': only the base can have it"]),
        (
            {"a": {"match": {"of": "b", "quantity": "parameters", "by": ["run.steps"]}}},
            ["there is no arm 'b'"],
        ),
        (
            {"a": {}, "b": {"match": {"of": "a", "quantity": "flops", "by": ["run.steps"]}}},
            ["arms.b.match.quantity", "inference_flops"],
        ),
        (
            {
                "a": {},
                "b": {"match": {"of": "a", "quantity": "parameters", "by": ["run.steps"], "times": 2.0}},
            },
            ["arms.b.match: run.steps do not change the parameters"],
        ),
        (
            {"a": {}, "b": {"match": {"of": "a", "quantity": "parameters", "by": ["run.steps"]}}},
            ["arms.b.match: run.steps do not change the parameters"],
        ),
        (
            {
                "a": {"backbone": {"num_hidden_layers": 1}},
                "b": {"match": {"of": "a", "quantity": "inference_flops", "by": ["run.steps"]}},
            },
            ["arms.b.match: run.steps do not change the inference_flops"],
        ),
        (
            {
                "a": {},
                "b": {
                    "backbone": {"hidden_size": 64, "intermediate_size": 256},
                    "match": {
                        "of": "a",
                        "quantity": "inference_flops",
                        "by": ["backbone.num_hidden_layers"],
                    },
                },
            },
            ["of those wanted even with backbone.num_hidden_layers = 1; must be 1 or less"],
        ),
        (
            {"a": {}, "b": {"match": {"of": "a", "quantity": "parameters", "by": ["backbone.layers"]}}},
            ["by: 'backbone.layers' is no key of the recipe"],
        ),
        (
            {
                "a": {"match": {"of": "b", "quantity": "parameters", "by": ["run.steps"]}},
                "b": {"match": {"of": "a", "quantity": "parameters", "by": ["run.steps"]}},
            },
            ["arms match one another"],
        ),
        ({"a/b": {}}, ["arm 'a/b': an arm's name may hold letters"]),
        ({"report.html": {}}, ["arm 'report.html': an arm's name may not end in .json, .png, .html"]),
        (
            {
                "a": {},
                "b": {"match": {"of": "a", "quantity": "training_flops", "by": ["run.batch_tokens"]}},
            },
            ["arms.b.match.by: 'run.batch_tokens' is what all arms share"],
        ),
        (
            {"a": {}, "b": {"evaluators": {"validation": {"max_tokens": 64}}}},
            [
                "the arms have no evaluator with a loss in common",
                "they differ in: evaluators.validation.max_tokens 256, 64",
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_study_is_said(tmp_path, arms, messages):
    with pytest.raises(RecipeError) as error:
        read_study(write(tmp_path, arms))
    for message in messages:
        assert message in str(error.value).replace(str(tmp_path) + "/", "")


def test_a_study_needs_a_loss_in_common(tmp_path):
    sample = {"sample": {"kind": "sample", "prompt": "def"}}
    (tmp_path / "base.toml").write_text(
        tomli_w.dumps({**RECIPE, "evaluators": RECIPE["evaluators"] | sample})
    )
    read_study(write(tmp_path, {"a": {}, "b": {"evaluators": {"validation": {"every": 7}}}}))
    with pytest.raises(RecipeError, match="no evaluator with a loss in common"):
        read_study(write(tmp_path, {"a": {}, "b": {"evaluators": {"validation": {"max_tokens": 64}}}}))


def test_unknown_keys_of_a_study(tmp_path):
    with pytest.raises(RecipeError, match=r"seed.*seeds"):
        read_study(write(tmp_path, {"a": {}}, seed=[1]))
    with pytest.raises(RecipeError, match=r"seeds = \[1, 1\]"):
        read_study(write(tmp_path, {"a": {}}, seeds=[1, 1]))
    with pytest.raises(
        RecipeError, match=r"^--set run.seed=3: an arm is trained with the seeds of the study"
    ):
        read_study(write(tmp_path, {"a": {}, "b": LATENT}), ["run.seed=3"])
    assert command("sweep", tmp_path / "none.toml") == 2


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_sweep_trains_compares_and_goes_on(tmp_path, capsys):
    failing = {"optimizer": {"lr": 1e30}}  # nothing is finite after a step
    match = {"quantity": "training_flops", "of": "latent", "by": ["run.steps"]}
    arms = {"plain": {}, "failing": {**failing, "match": match}, "latent": LATENT}
    path = write(tmp_path, arms, seeds=[0, 1])
    assert command("sweep", path, "--out", "out", "--jobs", 2) == 1
    said = capsys.readouterr()
    assert "arm 'failing': training_flops " in said.out
    assert "failing, seed 0 failed" in said.err
    assert "failing, seed 1 failed" in said.err
    figures = {row["arm"]: row for row in json.loads((tmp_path / "out/comparison.json").read_text())}
    assert set(figures) == {"plain", "latent"}
    assert figures["latent"]["seeds"] == [0, 1]
    assert len(figures["latent"]["validation_loss"]) == 2
    assert figures["latent"]["thoughts"] == 1
    assert (
        figures["latent"]["training_operations_per_token"] > figures["plain"]["training_operations_per_token"]
    )
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert not re.search(r'(src|href)="(?!data:)', page)  # all of it is in the one file
    assert 'recurrence.kind = "latent_thoughts"' in page.replace("&#34;", '"')

    before = (tmp_path / "out/plain/seed0/metrics.jsonl").stat().st_mtime_ns
    write(tmp_path, {"plain": {}})
    assert command("sweep", path, "--out", "out") == 0  # nothing is left to do
    assert (tmp_path / "out/plain/seed0/metrics.jsonl").stat().st_mtime_ns == before
    write(tmp_path, {"plain": {"optimizer": {"lr": 2e-2}}})
    assert command("sweep", path, "--out", "out") == 2  # what that run reached is not this arm's
    said = capsys.readouterr().err.replace("\n", " ")
    assert "arm 'plain'" in said
    assert "optimizer.lr: 0.01 there, 0.02 here" in said
    for steps in (2, 8):  # fewer, or more at the end of another schedule
        write(tmp_path, {"plain": {"run": {"steps": steps}}, "new": {}})
        assert command("sweep", path, "--out", "out") == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert f"is a run of 4 steps, and run.steps is {steps} now" in said
        assert not (tmp_path / "out/new").exists()
    base = {**RECIPE, "evaluators": {"validation": {"kind": "perplexity", "max_tokens": 64}}}
    (tmp_path / "base.toml").write_text(tomli_w.dumps(base))
    write(tmp_path, {"plain": {}, "new": {}})
    assert command("sweep", path, "--out", "out") == 2  # nothing would compare the two
    said = capsys.readouterr().err.replace("\n", " ")
    assert "they differ in: evaluators.validation.max_tokens 256, 64" in said
    assert not (tmp_path / "out/new").exists()


def test_the_base_of_a_study_is_its_first_arm_whichever_runs_fail(tmp_path, capsys):
    out, sizes = tmp_path / "out", {"plain": {}, "wide": {"intermediate_size": 64}}
    path = write(tmp_path, {arm: {"backbone": size} for arm, size in sizes.items()}, seeds=[0, 1])
    for arm, seed in (("plain", 1), ("wide", 0), ("wide", 1)):
        backbone, run = RECIPE["backbone"] | sizes[arm], RECIPE["run"] | {"seed": seed}
        train(out / arm / f"seed{seed}", backbone=backbone, run=run)
    for base, others in (("plain", ["wide"]), ("wide", [])):
        (out / "plain/seed0").write_text("no directory can be made here")
        assert command("sweep", path, "--out", "out") == 1
        said = capsys.readouterr()
        rows = json.loads((out / "comparison.json").read_text())
        assert [(row["arm"], row["base"]) for row in rows] == [(arm, base) for arm in (base, *others)]
        assert f"against {base}" in said.out
        warning = "arm 'plain' has no finished run: the others are compared with arm 'wide'"
        assert (warning in said.err) == (base == "wide")
        if base == "plain":
            shutil.rmtree(out / "plain/seed1")
            (out / "plain/seed1").write_text("nor here")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, perhaps for lack of memory (all of it in "),
        ("os.kill(os.getpid(), 6)", "killed by SIGABRT (all of it in "),
        ("os._exit(3)", "it printed nothing (exit code 3; all of it in "),
        ("print('no room', flush=True) or os._exit(3)", "no room (exit code 3; all of it in "),
    ],
)
def test_what_ended_a_run_is_said_of_this_call(tmp_path, capsys, ends, said):
    (tmp_path / "ends.py").write_text(f"import os, sys\nif 'run' in sys.argv:\n    {ends}\n")
    (tmp_path / "base.toml").write_text(tomli_w.dumps({**RECIPE, "imports": ["ends.py"]}))
    log = tmp_path / "out/plain/seed0.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 3/6  loss 5.1\n")  # of an earlier call
    assert command("sweep", write(tmp_path, {"plain": {}}), "--out", "out") == 1
    assert f"plain, seed 0 failed: {said}" in capsys.readouterr().err


def test_a_sweep_that_is_refused_changes_nothing(tmp_path):
    """What the one that goes on will train lies in arm.toml."""
    out = tmp_path / "out"
    path = write(tmp_path, {"plain": {}})
    sweep(read_study(path), out)
    shutil.rmtree(out / "plain/seed0")
    before = (out / "plain/arm.toml").read_bytes()
    write(tmp_path, {"plain": {"optimizer": {"lr": 2e-2}}})
    with locked(out), pytest.raises(RunExists, match="another process"):
        sweep(read_study(path), out)
    assert (out / "plain/arm.toml").read_bytes() == before


def test_an_interrupted_sweep_loses_nothing(tmp_path):
    long = {**RECIPE, "run": {**RECIPE["run"], "steps": 400}}
    (tmp_path / "base.toml").write_text(tomli_w.dumps(long))
    path = write(tmp_path, {"plain": {}})
    process = subprocess.Popen([sys.executable, "-m", "lattice", "sweep", str(path), "--out", "out"])
    metrics = tmp_path / "out/plain/seed0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 20):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # under nohup
    os.kill(process.pid, signal.SIGTERM if ignored else signal.SIGHUP)  # its terminal is closed
    assert process.wait(60) == 130
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] < 400
    study = read_study(path)
    assert len(sweep(study, tmp_path / "out").folders) == 1
    whole = train(tmp_path / "whole", run=long["run"])

    def losses(file):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    assert losses(metrics) == losses(whole / "metrics.jsonl")
    assert all(job.finished for job in jobs_of(study, tmp_path / "out"))


def test_a_sweep_that_fails_leaves_no_run_behind(tmp_path, monkeypatch):
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    study = read_study(write(tmp_path, {"plain": {}, "failing": {}}))
    (tmp_path / "out/failing/seed0.log").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"seed0\.log"):
        sweep(study, tmp_path / "out", at_once=2)
    assert [process.returncode is None for process in started] == [False]


def test_files_with_the_names_of_packages_do_not_disturb_a_sweep(tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('not the package')")
    (tmp_path / "mine.py").write_text("print('of my own')")
    base = {**RECIPE, "imports": ["mine.py"], "run": {**RECIPE["run"], "steps": 1}}
    (tmp_path / "base.toml").write_text(tomli_w.dumps(base))
    assert not sweep(read_study(write(tmp_path, {"plain": {}})), tmp_path / "out").failed
    assert "of my own" in (tmp_path / "out/plain/seed0.log").read_text()


@pytest.mark.parametrize(("jobs", "shared"), [(1, [0]), (2, [0, 1]), (3, [0, 0, 1])])
def test_each_run_has_a_gpu_of_its_own_while_there_are_enough(tmp_path, monkeypatch, capsys, jobs, shared):
    """The runs wait for each other, so that as many as may run at once note down their GPU while they do."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    (tmp_path / "note.py").write_text(
        "import os, sys, time\n"
        "if 'run' in sys.argv:\n"
        "    open(f'gpu_{os.getpid()}', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    for _ in range(600):\n"
        f"        if len([name for name in os.listdir() if name.startswith('gpu_')]) >= {jobs}: break\n"
        "        time.sleep(0.1)\n"
    )
    base = {**RECIPE, "imports": ["note.py"], "run": {**RECIPE["run"], "device": "auto", "steps": 1}}
    (tmp_path / "base.toml").write_text(tomli_w.dumps(base))
    study = read_study(write(tmp_path, {"plain": {}}, seeds=list(range(jobs))))
    assert not sweep(study, tmp_path / "out", at_once=jobs).failed
    noted = sorted(path.read_text() for path in tmp_path.glob("gpu_*"))
    assert noted == [["5", "GPU-ab"][index] for index in shared]
    assert ("3 runs at once share 2 GPUs" in capsys.readouterr().out) == (jobs == 3)


# ── comparisons ───────────────────────────────────────────────────────────────────────────────────
def test_runs_of_other_text_do_not_compare(tmp_path, capsys):
    train(tmp_path / "one")
    train(tmp_path / "other", data={"kind": "embedded", "megabytes": 1.0, "validation_fraction": 0.2})
    runs, _ = find_runs([tmp_path / "one", tmp_path / "other"])
    with pytest.raises(ValueError, match=r"do not compare, for they differ in: training text \w+, \w+"):
        check_comparable(runs)
    assert command("compare", "one", "other") == 2
    assert "do not compare" in capsys.readouterr().err.replace("\n", " ")


def test_runs_are_one_arm_if_only_their_seed_differs(tmp_path):
    for seed in (0, 1):
        train(tmp_path / f"seed{seed}", run={**RECIPE["run"], "seed": seed})
    train(tmp_path / "wide", backbone={**RECIPE["backbone"], "intermediate_size": 64})
    runs, unfinished = find_runs([tmp_path])
    assert not unfinished
    groups = groups_of(runs)
    assert sorted(len(group.runs) for group in groups) == [1, 2]
    spread = next(group for group in groups if len(group.runs) == 2).of("validation_loss")
    losses = [
        json.loads((tmp_path / f"seed{seed}/summary.json").read_text())["validation_loss"] for seed in (0, 1)
    ]
    assert (spread.low, spread.high) == (min(losses), max(losses))
    assert spread.mean == pytest.approx(sum(losses) / 2)


def test_how_runs_are_computed_and_when_they_are_evaluated_splits_no_arm(tmp_path):
    train(tmp_path / "one")
    train(
        tmp_path / "other",
        run={**RECIPE["run"], "seed": 1, "micro_batch": 4, "log_every": 1},
        checkpoint={"kind": "dcp", "every": 3},
        evaluators={"validation": {**RECIPE["evaluators"]["validation"], "every": 4}},
    )
    (row,) = report(find_runs([tmp_path])[0], None)
    assert row["seeds"] == [0, 1]
    assert len(row["validation_loss"]) == 2


def test_what_evaluators_measure_otherwise_is_said(tmp_path):
    train(tmp_path / "one")
    train(tmp_path / "other", evaluators={"validation": {"kind": "perplexity", "max_tokens": 64}})
    differ = "they differ in: evaluators.validation.max_tokens 256, 64$"
    with pytest.raises(ValueError, match=f"no evaluator with a loss in common.*{differ}"):
        report(find_runs([tmp_path])[0], None)


def test_a_family_differs_in_its_thoughts_alone(tmp_path):
    def thinking(count, **options):
        return load_recipe(
            {**RECIPE, "recurrence": {"kind": "latent_thoughts", "thoughts": count, **options}}
        )

    sweeps = {"solver": "gauss_seidel"}
    longer = {"run": {**RECIPE["run"], "steps": 8}}
    recipes = {
        "sweeps_2": thinking(2, **sweeps),
        "plain": thinking(0),
        "plain_longer": load_recipe({**thinking(0).table(), **longer}),
        "jacobi_1": load_recipe(thinking(1), ["run.micro_batch=4", "checkpoint.every=3"]),
        "sweeps_1": thinking(1, **sweeps),
        "none": load_recipe({**RECIPE, "recurrence": {"kind": "none"}}),
        "depth": load_recipe({**RECIPE, "recurrence": {"kind": "depth"}}),
    }
    groups = [Group(name, (Run(tmp_path, recipe, {}),)) for name, recipe in recipes.items()]
    found = [[group.name for group in family] for family in families_of(groups)]
    assert found == [["plain", "sweeps_1", "sweeps_2"], ["plain", "jacobi_1"]]


def test_a_run_that_is_not_finished_is_left_out(tmp_path, capsys):
    train(tmp_path / "runs/done")
    train(tmp_path / "runs/other")
    (tmp_path / "runs/other/summary.json").unlink()
    assert command("compare", "runs") == 0
    assert "'runs/other' is not finished and left out" in capsys.readouterr().out
    assert command("compare", "nothing") == 2


def test_a_finished_run_that_goes_on_is_not_finished(tmp_path):
    """Its summary is of fewer steps than its recipe has by now."""
    recipe = train(tmp_path / "run") / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("steps = 4", "steps = 400"))
    assert find_runs([tmp_path]) == ([], [tmp_path / "run"])


def test_arms_of_the_same_recipe_stay_apart_and_a_run_counts_once(tmp_path):
    for arm in ("one", "other"):
        train(tmp_path / arm / "seed0")
    runs, _ = find_runs([tmp_path, tmp_path / "one", tmp_path / "other" / ".." / "one"])
    assert [(group.name, len(group.runs)) for group in groups_of(runs)] == [("one", 1), ("other", 1)]
    train(tmp_path / "wide", backbone={**RECIPE["backbone"], "intermediate_size": 64})
    runs, _ = find_runs([tmp_path / arm for arm in ("other", "wide", "one")])
    assert [group.name for group in groups_of(runs)] == ["other", "wide", "one"]  # as they were given


@pytest.mark.parametrize("left", [None, "", '{"step": 4, "tokens": 512, "validation/loss": 5.0}\n'])
def test_a_run_without_its_metrics_is_named(tmp_path, capsys, left):
    train(tmp_path / "runs/one")
    metrics = train(tmp_path / "runs/other") / "metrics.jsonl"
    metrics.unlink() if left is None else metrics.write_text(left)
    assert command("compare", "runs") == 2
    assert "runs/other/metrics.jsonl holds no step of a run that has taken 4" in capsys.readouterr().err


def test_a_recipe_beside_runs_hides_none_of_them(tmp_path, capsys):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/recipe.toml").write_text(tomli_w.dumps(RECIPE))
    for command_ in ("compare", "plot"):
        assert command(command_, "exp") == 2
        assert "'exp' is no run and holds none" in capsys.readouterr().err
    for seed in (0, 1):
        train(tmp_path / f"exp/seed{seed}", run={**RECIPE["run"], "seed": seed})
    for given in ("exp", "."):
        assert command("compare", given, "--out", "out") == 0
        assert "left out" not in capsys.readouterr().out
        (row,) = json.loads(Path("out/comparison.json").read_text())
        assert row["seeds"] == [0, 1]
    assert command("plot", "exp") == 0


def drawn(monkeypatch):
    """What axes are asked to plot: a list that fills."""
    lines, plot = [], Axes.plot

    def noting(axes, *arguments, **options):
        lines.append((*arguments, options["label"]))
        return plot(axes, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", noting)
    return lines


def test_the_residuals_that_are_drawn_are_kept(tmp_path, monkeypatch):
    """As a mean over the last tenth of all seeds, of the steps that iterated so often."""
    for seed, residuals in enumerate([{90: [9.0], 91: [1.0], 100: [3.0, 0.5]}, {96: [5.0]}]):
        run = train(tmp_path / f"seed{seed}", run={**RECIPE["run"], "seed": seed})
        recipe = run / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("steps = 4", "steps = 100"))
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"steps": 100}))
        with (run / "metrics.jsonl").open("a") as metrics:
            for step, values in residuals.items():
                metrics.write(json.dumps({"step": step, "tokens": 1, "residuals": values}) + "\n")
    lines = drawn(monkeypatch)
    assert command("compare", ".", "--out", "out") == 0
    (row,) = json.loads(Path("out/comparison.json").read_text())
    assert row["residuals"] == [3.0, 0.5]
    iterations, means, _ = lines[-1]
    assert (list(iterations), list(means)) == ([1, 2], row["residuals"])


def test_the_markers_of_a_long_run_are_no_band(tmp_path, monkeypatch):
    losses = [[2.0], [2.0] * 10, [2.0] * 500, [math.nan] * 500]
    lines, plot = [], Axes.plot
    folders = [tmp_path / f"run_{index}" for index in range(len(losses))]
    for folder, of in zip(folders, losses, strict=True):
        folder.mkdir()
        rows = [{"step": at, "tokens": at, "validation/loss": loss} for at, loss in enumerate(of)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Axes, "plot", lambda *given, **options: lines.extend(plot(*given, **options)))
    curves(folders)
    assert [line.get_markevery() is None for line in lines] == [True, True, False, True]  # all of few


def legends_of(monkeypatch):
    """The legends of figures: a list that fills."""
    legends, legend = [], Figure.legend

    def noting(figure, *arguments, **options):
        legends.append(legend(figure, *arguments, **options))
        return legends[-1]

    monkeypatch.setattr(Figure, "legend", noting)
    return legends


def names_in(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_curves_are_averaged_where_all_seeds_were_evaluated(tmp_path, monkeypatch):
    losses = [{128: 4.0, 256: 3.0, 512: 1.0}, {256: 5.0, 384: 9.0, 512: 2.0}]
    for seed, curve in enumerate(losses):
        rows = [{"step": 1, "tokens": at, "loss": 9.0, "validation/loss": loss} for at, loss in curve.items()]
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [Run(tmp_path / f"seed{seed}", load_recipe(RECIPE), {}) for seed in (0, 1)]
    lines = drawn(monkeypatch)
    _curves([Group("arm", tuple(runs))], "validation", "tokens", lambda group, tokens: tokens)
    ((tokens, means, _),) = lines
    assert (list(tokens), list(means)) == ([256, 512], [4.0, 1.5])


def test_a_metric_that_is_not_finite_leaves_the_others(tmp_path, monkeypatch):
    (tmp_path / "_run").mkdir()
    rows = [
        {"step": at, "tokens": at, "loss": loss} for at, loss in enumerate([math.inf, 2.0, math.nan, 4.0])
    ]
    (tmp_path / "_run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, legends = drawn(monkeypatch), legends_of(monkeypatch)
    curves([Path("_run")])
    ((_, means, _),) = lines
    assert math.isnan(means[0])
    assert list(means[1:]) == [2.0, 2.0, 3.0]
    assert [names_in(legend) for legend in legends] == [[" _run"]]  # matplotlib leaves out what begins with _


@pytest.mark.filterwarnings("error")  # of axes that are left no room
def test_a_plot_of_many_runs_names_them_all_and_leaves_the_curves_their_room(tmp_path, monkeypatch):
    rows = [{"step": at, "tokens": at, "loss": 2.0, "validation/loss": 2.0} for at in range(3)]
    folders = [tmp_path / ("of a long name " * 9) / f"arm_{index}/seed0" for index in range(40)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    legends = legends_of(monkeypatch)
    for few in (folders, folders[:1]):
        png = curves(few, ["loss", "validation/loss"])
        legend = legends.pop()
        figure = legend.figure
        assert names_in(legend) == (
            [f"arm_{index}/seed0" for index in range(40)] if few == folders else ["seed0"]
        )
        assert all(axes.get_position().width > 0.8 for axes in figure.axes)
        drawn_height, drawn_width, _ = plt.imread(io.BytesIO(png)).shape
        assert drawn_height > 130 * (figure.get_figheight() + legend.get_window_extent().height / figure.dpi)
        assert drawn_width < 130 * 1.05 * figure.get_figwidth()
        training, _ = figure.axes
        styles = {(line.get_color(), line.get_linestyle()) for line in training.lines}
        assert len(styles) == len(few)  # though these have no markers
    assert not legends  # one for both panels


def test_the_base_differs_least_from_all_and_costs_least_or_is_the_first_of_a_study(tmp_path):
    wide = {"backbone": {"intermediate_size": 64}}
    path = write(tmp_path, {"deep": {"backbone": {"num_hidden_layers": 4}}, "plain": {}, "wide": wide})
    assert command("sweep", path, "--out", "out") == 0
    assert "What each changes of <code>deep</code>" in Path("out/report.html").read_text()
    assert command("compare", "out", "--out", "whole") == 0
    assert "What each changes of <code>plain</code>" in Path("whole/report.html").read_text()
    assert command("compare", "out/deep", "out/plain", "--out", "two") == 0
    assert "What each changes of <code>plain</code>" in Path("two/report.html").read_text()


def test_a_run_that_was_prolonged_is_no_seed_of_one_that_was_not(tmp_path, capsys):
    """Its learning rate had gone down to its end before it went up again."""
    few, more = ({"run": RECIPE["run"] | {"steps": steps}} for steps in (2, 4))
    prolonged, whole = tmp_path / "runs" / "prolonged", tmp_path / "runs" / "whole"
    train(prolonged, **few)
    train(prolonged, **more)
    train(whole, run=more["run"] | {"seed": 1})
    capsys.readouterr()
    assert command("compare", "runs", "--out", "out") == 0
    out, said = capsys.readouterr()
    assert "arm 'prolonged': had 2 steps until step 2: its learning rate has followed several" in said
    arms = json.loads(Path("out/comparison.json").read_text())
    assert [(arm["arm"], arm["seeds"]) for arm in arms] == [("prolonged", [0]), ("whole", [1])], out


def test_losses_are_shown_against_the_bases_run_of_the_same_seed(tmp_path, capsys):
    arms = {"plain": (0, 1), "wide": (1, 0), "deep": (0, 2)}
    sizes = {"plain": {}, "wide": {"intermediate_size": 64}, "deep": {"num_hidden_layers": 3}}
    losses = {}
    for arm, seeds in arms.items():
        for seed in seeds:
            backbone, run = RECIPE["backbone"] | sizes[arm], RECIPE["run"] | {"seed": seed}
            folder = train(tmp_path / "runs" / arm / f"seed{seed}", backbone=backbone, run=run)
            losses[arm, seed] = json.loads((folder / "summary.json").read_text())["validation_loss"]
    assert command("compare", "runs", "--out", "out") == 0
    shown = capsys.readouterr().out
    assert "against plain" in shown
    wide = [losses["wide", seed] - losses["plain", seed] for seed in (0, 1)]
    deep = losses["deep", 0] - losses["plain", 0]
    page = Path("out/report.html").read_text()
    for expected in (f"{wide[0]:+.4f}, {wide[1]:+.4f}", f"{deep:+.4f}, none"):
        assert expected in shown
        assert f"<td>{expected}</td>" in page
    rows = {row["arm"]: row for row in json.loads(Path("out/comparison.json").read_text())}
    assert {row["base"] for row in rows.values()} == {"plain"}
    against = {arm: row["validation_loss_against_base"] for arm, row in rows.items()}
    assert against == {"plain": [0.0, 0.0], "wide": wide, "deep": [deep, None]}


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([5.12e6, 24.5e6], ["tokens, M", "5.12", "24.5"]),
        ([0.14e15, 0.0645e15, 70e12, 1.4e15], ["tokens, T", "140", "64.5", "70.0", "1,400"]),
        ([300e9, 1.4e9], ["tokens, B", "300", "1.40"]),
        ([10_112, 9_996, 0.5e6], ["tokens, k", "10.1", "10.0", "500"]),
        ([512, 999.9], ["tokens", "512", "1,000"]),
        ([2.85e7], ["tokens, M", "28.5"]),
        ([0, 4096], ["tokens", "0.00", "4,096"]),
    ],
)
def test_a_column_has_one_unit_and_three_digits(values, column):
    assert _scaled("tokens, {}", values, COUNTED) == column


def test_operations_have_the_prefixes_of_units():
    assert _scaled("{}FLOP", [3e9, 5e12]) == ["GFLOP", "3.00", "5,000"]


def test_what_an_arm_lacks_of_the_base_is_said():
    books = {"books": {"kind": "documents", "max_documents": 3}}
    base = load_recipe({**RECIPE, "evaluators": RECIPE["evaluators"] | books, "recurrence": THINKING})
    settings = ['evaluators.books={kind = "documents", overlap = 2}', "recurrence.kind=none", "run.seed=1"]
    other = load_recipe(RECIPE, settings)
    assert _differences(base, other) == [
        'recurrence.kind = "none"',
        "recurrence.initializer_range = 0.02",
        "evaluators.books.overlap = 2",
        "evaluators.books.max_documents: unset",
    ]
    without = load_recipe({**RECIPE, "recurrence": THINKING})
    assert _differences(base, without) == ["evaluators.books.kind: unset"]


def test_fingerprints_compare_under_any_name(tmp_path):
    def run(name, prints):
        return Run(tmp_path / name, load_recipe(RECIPE), {"provenance": {"fingerprints": prints}})

    check_comparable([run("one", {"words": "ab"}), run("other", {"words": "ab"})])
    with pytest.raises(ValueError, match=r"they differ in: more unset, cd; words ab, ba$"):
        check_comparable([run("one", {"words": "ab"}), run("other", {"words": "ba", "more": "cd"})])


def test_plot_draws_any_runs(tmp_path, capsys, monkeypatch):
    train(tmp_path / "runs/one")
    (tmp_path / "runs/one/summary.json").unlink()  # a run that goes on has none
    labels = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, label: labels.append(label))
    assert command("plot", "runs", "--metrics", "loss", "validation/loss", "--out", "c.png") == 0
    assert labels == ["loss, mean of 50 steps", "validation/loss"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert command("plot", "runs", "--metrics", "los") == 2
    assert "no run has the metric 'los'. Known:" in capsys.readouterr().err
    assert command("plot", "runs", "--out", "c.svg") == 2
    assert "--out c.svg: must end in .png" in capsys.readouterr().err
    metrics = tmp_path / "runs/one/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "tokens": 512, "residuals": [0.1]}\n')
    assert command("plot", "runs", "--metrics", "residuals") == 2
    assert "the metric 'residuals' is no single number" in capsys.readouterr().err
    (tmp_path / "runs/one").rename(tmp_path / "runs/a$x_{$")  # no mathematics
    assert command("plot", "runs", "--out", "d.png") == 0
    (tmp_path / "runs/a$x_{$/metrics.jsonl").unlink()
    assert command("plot", "runs") == 2
    assert "no run has a loss yet" in capsys.readouterr().err
