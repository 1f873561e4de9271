"""Runs that are interrupted, by signals or worse, and go on as if nothing had been."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest
import torch

import lattice
from lattice import run_folder
from lattice.atomic import CannotWrite
from lattice.interrupts import StopRequest
from lattice.train import Loop
from tests.integration.training_runs import checkpoints, rows, start, steps, stop_at

LATE = ("recurrence={kind='test_late'}", "optimizer={kind='test_keeping', decay=0.001}")


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_state_that_comes_late_goes_on_as_well(stop, train, whole, tmp_path):
    """Of a parameter that no gradient had reached a checkpoint holds no state."""
    expected = whole(*LATE)
    train(*LATE, *stop_at(stop))
    train(*LATE)
    assert rows(tmp_path / "run") == expected


def test_a_run_begins_with_the_weights_that_were_drawn(train, monkeypatch):
    """Whatever a step of the optimizer would do without gradients."""
    drawn = {name: one.clone() for name, one in lattice.build_model(train.recipe).state_dict().items()}
    seen = []

    class Looking(Exception):
        pass

    def look(loop):
        seen.append({name: one.clone() for name, one in loop.graph.model.state_dict().items()})
        raise Looking

    monkeypatch.setattr(Loop, "run", look)
    with pytest.raises(Looking):
        train("optimizer={kind='test_keeping', decay=0.5}")
    assert seen[0].keys() == drawn.keys()
    assert all(torch.equal(seen[0][name], one) for name, one in drawn.items())


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision.kind=fp32",),
        ("precision.kind=bf16",),
        ("precision.kind=bf16", "mask.kind=document", "activation_checkpoint.kind=pass", "run.micro_batch=2"),
        ("run.deterministic=true", "recurrence.feedback=softmax", "recurrence.top_k=3"),
        ("backbone.tie_word_embeddings=true", "checkpoint.asynchronous=false", "run.micro_batch=8"),
        ("optimizer={kind='test_descent'}",),
        ("recurrence={kind='test_noise'}", "evaluators.draws={kind='test_drawing', every=1}"),
    ],
)
def test_a_run_interrupted_twice_computes_the_same_bits(overrides, whole, train, tmp_path, capsys):
    expected = whole(*overrides)
    assert len([row for row in expected if "loss" in row]) == 12
    assert {len(row["residuals"]) for row in expected if "loss" in row} == {1, 2, 3}, "counts are drawn"
    for step in (5, 8):  # between two checkpoints, and on one
        stopped = train(*overrides, *stop_at(step))
        assert stopped == {"stopped_at": step, "folder": str(tmp_path / "run")}
        assert f"SIGTERM: stopped after step {step} and saved" in capsys.readouterr().out
        assert not (tmp_path / "run" / "summary.json").exists()
    summary = train(*overrides)
    assert f"resuming '{tmp_path / 'run'}' after step 8" in capsys.readouterr().out
    assert rows(tmp_path / "run") == expected
    for named, key in (("last_loss", "loss"), ("validation_loss", "validation/loss")):
        assert summary[named] == [row[key] for row in expected if key in row][-1]


def test_a_signal_during_the_last_step_finishes_the_run(train, whole, tmp_path):
    summary = train(*stop_at(12, "SIGINT"))
    assert summary["steps"] == 12
    assert (tmp_path / "run" / "summary.json").is_file()
    assert rows(tmp_path / "run") == whole()


def test_signal_handlers_are_put_back(train):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(*stop_at(2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_deterministic_kernels_are_for_the_run_alone(train, monkeypatch):
    seen, run = [], Loop.run

    def watched(loop):
        seen.append(settings())
        return run(loop)

    def settings():
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, workspace

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(Loop, "run", watched)
    train("run.deterministic=true", "run.steps=5", *stop_at(2))
    train("run.steps=5")  # the same run may go on without
    assert seen == [(True, True, ":4096:8"), (False, False, None)]
    assert settings() == seen[1]


def test_a_forked_child_dies_of_sigterm():
    """As the workers of a pool must, which ends them so and waits for them; however early it comes."""
    with StopRequest() as outer, StopRequest() as inner:
        handler = signal.getsignal(signal.SIGTERM)
        for delay in (0.0, 0.3):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            time.sleep(delay)
            child.terminate()
            child.join(10)
            left, code = child.is_alive(), child.exitcode
            child.kill()
            assert not left
            assert code == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == handler
        os.kill(os.getpid(), signal.SIGTERM)
        assert (outer.received, inner.received) == (None, "SIGTERM")


def wait_for_step_2(process):
    for line in process.stdout:
        if line.startswith("step 2/12"):
            break


def stopped_by_sigterm(process, run):
    """The steps of a run of twelve that has saved and ended well."""
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM: stopped after step" in out
    assert "Traceback" not in errors
    done = steps(run)
    assert 2 <= len(done) < 12
    return done


def test_sigterm_from_outside_and_the_lock(place, train, whole, tmp_path):
    """As a cluster does it: the process saves and exits with 0; until then nobody else may train there."""
    process = start(place, tmp_path / "run", "metrics.slow.kind=test_signal", "metrics.slow.sleep=0.2")
    wait_for_step_2(process)
    with pytest.raises(run_folder.RunExists, match=r"another process is training in '.*run'.*--out"):
        train()
    process.send_signal(signal.SIGTERM)
    stopped_by_sigterm(process, tmp_path / "run")
    train()
    assert rows(tmp_path / "run") == whole()


def test_a_run_whose_output_is_gone_goes_on_and_saves(place, tmp_path):
    """As `| tee` ends with the Ctrl-C that stops the run, or before it."""
    process = start(place, tmp_path / "run", *stop_at(7, "SIGINT"))
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert steps(tmp_path / "run") == list(range(1, 8))
    assert checkpoints(tmp_path / "run") == ["step-00000004", "step-00000007"]


def test_the_lock_ends_with_the_process_and_not_with_those_it_forked(tmp_path):
    """As data workers are, which notice late that their trainer was killed."""
    fork = multiprocessing.get_context("fork")
    locked, over = fork.Event(), fork.Event()

    def trainer():
        with run_folder.locked(tmp_path):
            fork.Process(target=over.wait).start()
            locked.set()
            time.sleep(1000)

    process = fork.Process(target=trainer)
    process.start()
    try:
        assert locked.wait(60)
        with pytest.raises(run_folder.RunExists), run_folder.locked(tmp_path):
            pass
        process.kill()
        process.join()
        with run_folder.locked(tmp_path):
            pass
    finally:
        over.set()


def test_a_directory_that_cannot_be_locked_is_not_told_to_be_in_use(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)  # no file system here is without
    with (
        pytest.raises(CannotWrite, match=r"'.*' cannot be locked for one process: Function not implemented"),
        run_folder.locked(tmp_path),
    ):
        pass


def test_sigterm_to_all_processes_leaves_the_data_workers_alone(place, short_documents, tmp_path):
    """As torchrun and schedulers send it: what is meant for the trainer reaches its workers, too."""
    slow = ("metrics.slow.kind=test_signal", "metrics.slow.sleep=0.2")
    options = (*short_documents, "run.steps=12", "data.workers=1", *slow)
    process = start(place, tmp_path / "run", *options, own_group=True)
    wait_for_step_2(process)
    os.killpg(process.pid, signal.SIGTERM)
    done = stopped_by_sigterm(process, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [f"step-{done[-1]:08}"]


def test_a_second_sigint_ends_at_once(place, tmp_path):
    process = start(place, tmp_path / "run", "metrics.slow.kind=test_signal", "metrics.slow.sleep=60")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals that are pending at once would be one
    assert process.poll() is None, "the first one waits for the end of the step"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("step", [1, 6, 9])
def test_kill_9_and_the_same_command_again(step, place, train, whole, tmp_path):
    process = start(place, tmp_path / "run", *stop_at(step, "SIGKILL"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert steps(tmp_path / "run") == list(range(1, step + 1))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # and a line that was cut short
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    train()
    assert steps(tmp_path / "run") == list(range(1, 13))
    assert rows(tmp_path / "run") == whole()


def test_killed_between_the_last_checkpoint_and_the_summary(train, whole, tmp_path):
    first = train()
    (tmp_path / "run" / "summary.json").unlink()
    again = train()
    timed = {"seconds", "tokens_per_second", "peak_memory_mib"}
    assert {key: again[key] for key in again.keys() - timed} == {
        key: first[key] for key in first.keys() - timed
    }
    assert steps(tmp_path / "run") == list(range(1, 13))
    assert rows(tmp_path / "run") == whole()


def test_the_peak_of_memory_is_that_of_all_parts(train, monkeypatch):
    monkeypatch.setattr(run_folder, "peak_memory_mib", lambda device: 900.0)
    train(*stop_at(2))
    monkeypatch.setattr(run_folder, "peak_memory_mib", lambda device: 100.0)
    assert train()["peak_memory_mib"] == 900.0


def test_a_finished_run_is_left_as_it_is(train, tmp_path, capsys):
    first = train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train() == first
    assert "has taken all its 12 steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
