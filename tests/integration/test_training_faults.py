"""Losses that are no numbers, damaged checkpoints, a full disk: named, and no more is lost than must be."""

import os
import shutil
import signal
import time

import pytest

import lattice
from lattice.components.checkpoint import dcp
from lattice.components.data._source import Sequences
from lattice.recipe import RecipeError
from lattice.watch import Watch
from tests.integration.training_runs import checkpoints, rows, start, steps, stop_at


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run(what, train, tmp_path):
    with pytest.raises(ValueError, match="not finite") as caught:
        train("recurrence.kind=test_not_finite", "recurrence.step=7", f"recurrence.what={what}")
    message, run = str(caught.value), tmp_path / "run"
    assert message.startswith("step 7: loss ")
    assert f"The last good checkpoint is {run / 'checkpoints' / 'step-00000004'}" in message
    identity = message.split("The batch: ")[1].split(". The last")[0]
    assert "epoch" in identity
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    model = lattice.load(run / "checkpoints" / "step-00000004", trust_imports=True)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not (run / "summary.json").exists()
    with pytest.raises(ValueError, match="step 7") as again:
        train("recurrence.kind=test_not_finite", "recurrence.step=7", f"recurrence.what={what}")
    assert str(again.value) == message, "the same batch is named when the run is tried again"


def test_no_number_before_the_first_checkpoint(train):
    with pytest.raises(ValueError, match=r"^step 1: .*There is no checkpoint yet"):
        train("recurrence.kind=test_not_finite", "recurrence.step=1")


def test_an_evaluation_that_fails_costs_no_step(train, whole, tmp_path):
    """Its step is saved; once it can be done, all is as if nothing had been."""
    run, file = tmp_path / "run", tmp_path / "there"
    late = ("evaluators.late.kind=test_failing", f"evaluators.late.file={file}", "evaluators.late.every=8")
    for _ in range(2):
        with pytest.raises(ValueError, match="is not there"):
            train(*late)
        assert checkpoints(run) == ["step-00000004", "step-00000008"]
        assert steps(run) == list(range(1, 9))
    file.touch()
    assert train(*late)["late_done"] == 1.0
    assert [row for row in rows(run) if "late/done" not in row] == whole()
    assert [row["step"] for row in rows(run) if "late/done" in row] == [8, 12]


def test_figures_that_are_known_are_not_computed_again(train, whole, tmp_path):
    """After step 9 the run had evaluated and was stopped."""
    train(*stop_at(9))
    train()
    assert rows(tmp_path / "run") == whole()


def test_who_waits_for_a_save_is_saving(train, monkeypatch):
    """Else a save that takes longer than the time limit would end a run of several ranks."""
    at, wait, entries, phases, waited = Watch.at, dcp.DcpCheckpointer.wait, dcp.entries, [], []

    def noting(self, step, phase):
        phases.append(phase)
        at(self, step, phase)

    def waiting(self):
        if self._saving is not None and not self._saving.outcome.done():
            waited.append(phases[-1])
        wait(self)

    monkeypatch.setattr(Watch, "at", noting)
    monkeypatch.setattr(dcp.DcpCheckpointer, "wait", waiting)
    monkeypatch.setattr(dcp, "entries", lambda paths: time.sleep(0.5) or entries(paths))
    train("run.steps=5", *stop_at(4))
    train("run.steps=5")
    assert waited == ["checkpoint"] * 2


@pytest.mark.parametrize("name", ["loss", "step"])
def test_telemetry_cannot_take_the_place_of_what_the_run_logs(name, train):
    with pytest.raises(ValueError, match=f"telemetry '{name}': the run itself logs this"):
        train("recurrence={kind='test_telemetry', name='" + name + "'}")


@pytest.mark.parametrize(("name", "logged"), [("count", 3.0), ("flag", 1.0), ("bits", [1.0, 0.0])])
def test_telemetry_is_of_numbers_of_any_type(name, logged, train, tmp_path):
    train("recurrence={kind='test_telemetry', name='" + name + "'}", "run.steps=1")
    assert rows(tmp_path / "run")[0][name] == logged


def test_telemetry_that_is_no_number_is_named(train):
    with pytest.raises(
        TypeError, match="'test_telemetry': telemetry 'list' is a list; must be a real number"
    ):
        train("recurrence={kind='test_telemetry', name='list'}")


@pytest.mark.parametrize(("gives", "kind"), [("tensor", "Tensor"), ("list", "list"), ("none", "NoneType")])
def test_what_an_evaluator_gives_that_is_no_figure_is_named(gives, kind, train):
    with pytest.raises(
        ValueError, match=rf"\[evaluators.odd\] gives a {kind} for 'figure'; must be a number"
    ):
        train(f"evaluators.odd={{kind='test_drawing', every=1, gives='{gives}'}}", "run.steps=2")


def test_state_that_no_checkpoint_holds_is_refused_before_the_first_step(train, tmp_path):
    with pytest.raises(
        ValueError, match=r"optimizer 'test_descent': its state of .* has 'held', a int; must"
    ):
        train("optimizer={kind='test_descent', holds='int'}")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_weights_that_an_update_has_spoilt_are_not_saved(train, tmp_path):
    with pytest.raises(
        ValueError, match=r"step 8: after its update \d+ parameters are not finite.*step-00000004$"
    ):
        train("optimizer={kind='test_keeping', spoils=8}")
    assert checkpoints(tmp_path / "run") == ["step-00000004"]
    train("optimizer={kind='test_keeping', spoils=8}", "run.steps=7")


def test_an_optimizer_that_reads_values_trains(train, capsys):
    assert train("optimizer={kind='test_adafactor'}", "run.steps=2")["steps"] == 2
    assert "optimizer 'test_adafactor': what it computes depends on values" in capsys.readouterr().out


def test_held_out_loss_is_cross_entropy_whatever_is_minimised(train, tmp_path):
    """So that runs with other losses compare, evaluated in parallel or token by token."""
    sequential = "evaluators.token_by_token={kind='perplexity', max_tokens=64, sequential=true}"
    plain = train("recurrence={kind='none'}", "run.steps=1", sequential, out=tmp_path / "plain")
    doubled = train(
        "recurrence={kind='none'}",
        "loss={kind='test_doubled'}",
        "run.steps=1",
        sequential,
        out=tmp_path / "other",
    )
    assert doubled["last_loss"] == pytest.approx(2 * plain["last_loss"])
    # One step of AdamW does not depend on the scale of the gradient.
    assert doubled["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-4)
    assert doubled["validation_loss"] == pytest.approx(doubled["token_by_token_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("ended", "data 'test_wrong': ended before step 2 of 12"),
        ("short", r"ids_BL of epoch 0, sequences .* is torch.int64 of shape \(4, 15\); must be .*\(4, 16\)"),
        (
            "int32",
            r"targets_BL of epoch 0, sequences .* is torch.int32 of shape \(4, 16\); must be torch.int64",
        ),
        ("ignored", "step 2: no target counts; the batch: epoch 0, sequences"),
    ],
)
def test_batches_that_are_not_as_they_were_asked_for(how, message, train):
    with pytest.raises(ValueError, match=message):
        train(f"data={{kind='test_wrong', megabytes=0.5, how='{how}'}}")


def test_a_worker_that_was_killed_is_said(train, short_documents, monkeypatch, tmp_path):
    def killed(self, place):
        if place and 12 in place:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, place)

    read = Sequences.__getitem__
    monkeypatch.setattr(Sequences, "__getitem__", killed)
    with pytest.raises(ChildProcessError, match=r"a process that reads data ended.*fewer data\.workers"):
        train(*short_documents, "data.workers=1")


def test_an_evaluator_cannot_be_named_as_the_training_loss_is(train):
    with pytest.raises(ValueError, match=r"\[evaluators.last\]: 'last_loss' is the training's"):
        train("evaluators.last.kind=perplexity")


def test_what_evaluators_cannot_do_is_known_before_the_first_step(train, tmp_path):
    """All of it, each with the place that asks for it."""
    with pytest.raises(RecipeError) as caught:
        train(
            "evaluators.text={kind='sample', prompt='abc', max_new_tokens=62}",
            "evaluators.books={kind='documents', overlap=64}",
            f"evaluators.tasks={{kind='lm_eval', tasks='piqa', include='{tmp_path / 'gone'}'}}",
        )
    (text, books, tasks) = caught.value.problems
    assert text.startswith("--set: [evaluators.text]: a prompt of 3 tokens and 62 new ones do not fit")
    assert books == "--set: [evaluators.books]: overlap = 64: must be less than the model's context of 64"
    assert tasks.startswith("--set: [evaluators.tasks]: ")
    assert "gone' is no folder of task files" in tasks
    assert not (tmp_path / "run" / "recipe.toml").exists()


def damage(checkpoint):
    path = next(iter(sorted(checkpoint.glob("*.safetensors"))))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_latest_checkpoint_falls_back_to_the_one_before(train, whole, tmp_path):
    train(*stop_at(10))
    assert checkpoints(tmp_path / "run") == ["step-00000004", "step-00000008", "step-00000010"]
    damage(tmp_path / "run/checkpoints/step-00000010")
    with pytest.warns(
        UserWarning, match=r"step-00000010.*checksum differs; the checkpoint before it is tried"
    ):
        train()
    assert rows(tmp_path / "run") == whole()


def test_no_intact_checkpoint_is_an_error_and_not_a_new_start(train, tmp_path):
    train(*stop_at(5))
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        damage(checkpoint)
    with (
        pytest.warns(UserWarning, match="checksum differs"),
        pytest.raises(ValueError, match="none of the 2 checkpoints"),
    ):
        train()
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_checkpoint_of_another_model_is_refused(train, tmp_path):
    train("backbone.hidden_size=32", "run.steps=4", out=tmp_path / "wide")
    train(*stop_at(5))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "wide" / "checkpoints", tmp_path / "run" / "checkpoints")
    for call in (train, lambda: lattice.load(tmp_path / "run", trust_imports=True)):
        with pytest.raises(ValueError, match="32") as caught:
            call()
        assert "step-00000004" in str(caught.value)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_full_disk_leaves_the_last_good_checkpoint(place, train, whole, tmp_path):
    train(*stop_at(5))
    process = start(place, tmp_path / "run", limit=30_000)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2, out + errors
    assert "Traceback" not in errors
    assert "checkpoint of step 8 could not be saved" in errors
    assert "the last good one is step 5" in errors
    assert checkpoints(tmp_path / "run") == ["step-00000004", "step-00000005"]
    train()
    assert rows(tmp_path / "run") == whole()


def test_a_recipe_that_cannot_train_here_leaves_nothing_behind(train, tmp_path):
    for override, message in [
        ("backbone.max_position_embeddings=8", r"run\.sequence_tokens = 16.*max_position_embeddings = 8"),
        ("backbone.vocab_size=200", r"backbone\.vocab_size = 200.*257 tokens"),
        ("run.device=cuda:99", r"run\.device = 'cuda:99': not available"),
        ("backbone.hidden_size=4_000_000", "too little memory: needs at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(override)
        assert not (tmp_path / "run" / "recipe.toml").exists(), override
    train("run.steps=1")  # the directory is still free for a recipe that fits
