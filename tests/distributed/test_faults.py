"""What goes wrong with one rank: all end, one says why, the same command goes on from the last checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from ranks import losses, recipe_of, train_on

import lattice
from lattice.run_folder import read_metrics

USER = Path(__file__).with_name("misbehaving.py")
STEP = {"kind": "fsdp", "reshard": "step"}


def misbehaving(what, run=None, parallel=STEP, **options):
    """Six steps, a checkpoint after every second; in the third one rank misbehaves."""
    return {
        "imports": [str(USER)],
        **recipe_of(
            run={"steps": 6, **(run or {})},
            recurrence={"kind": "test_misbehaving", "what": what, **options},
            checkpoint={"kind": "dcp", "every": 2},
            parallel=parallel,
        ),
    }


def launch(folder, recipe, *options, ranks=2):
    """As a user does; returns the exit code and all that was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    lattice_run = ["-m", "lattice", "run", str(folder / "recipe.toml"), "--out", str(folder / "run")]
    done = subprocess.run(
        [*torchrun, *options, *lattice_run],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout + done.stderr


def events(run, rank):
    return [json.loads(line) for line in (run / "ranks" / f"{rank:05d}.jsonl").read_text().splitlines()]


def test_an_evaluator_that_fails_on_all_ranks_costs_no_step(tmp_path):
    """The save of that step is in flight, and the ranks end with it on disk."""
    recipe = misbehaving("nan", rank=9)
    recipe["imports"].append(str(USER.parents[1] / "integration" / "user.py"))
    recipe["evaluators"] = {"late": {"kind": "test_failing", "every": 2, "file": str(tmp_path / "gone")}}
    code, said = launch(tmp_path, recipe)
    assert code != 0
    assert "gone' is not there" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000002"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of six steps in which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    lattice.train(misbehaving("nan", rank=9, parallel={"kind": "single"}), out=folder)
    return losses(folder)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    cases = {what: misbehaving(what) for what in ("nan", "more_passes", "SIGTERM")}
    cases["data"] = {**misbehaving("nan", rank=9), "data": {"kind": "test_of_rank", "megabytes": 0.2}}
    return folder, train_on(2, cases, folder)


def test_a_loss_that_is_no_number_on_one_rank_stops_all_and_names_rank_and_batch(faults):
    folder, said = faults
    for rank, of_rank in enumerate(said["nan"]):
        assert of_rank["error"] == "NonFiniteLoss"
        assert re.search(r"step 3: loss nan.*The batch: rank 1: epoch 0, sequences", of_rank["message"])
        assert "step-00000002" in of_rank["message"], "the last good checkpoint"
        assert events(folder / "nan", rank)[-1] == events(folder / "nan", rank)[-1] | {
            "event": "fault",
            "error": "NonFiniteLoss",
            "rank": rank,
        }


def test_ranks_that_do_different_things_are_told_apart(faults):
    _, said = faults
    for of_rank in said["more_passes"]:
        assert of_rank["error"] == "Disagreement"
        assert re.search("rank 1: the number of passes in step 3", of_rank["message"])
    for of_rank in said["data"]:
        assert of_rank["error"] == "Disagreement"
        assert of_rank["message"] == "rank 1: the data is not that of rank 0"


def test_a_signal_to_one_rank_stops_all_after_the_same_step(faults, undisturbed):
    folder, said = faults
    assert [of_rank["summary"]["stopped_at"] for of_rank in said["SIGTERM"]] == [3, 3]
    assert (folder / "SIGTERM" / "checkpoints" / "step-00000003").is_dir()
    assert losses(folder / "SIGTERM") == pytest.approx(undisturbed[:3], abs=1e-5)
    goes_on = misbehaving("SIGTERM", parallel={"kind": "single"})
    lattice.train(goes_on, out=folder / "SIGTERM")
    assert losses(folder / "SIGTERM") == pytest.approx(undisturbed, abs=1e-5), (
        "on one rank, where two stopped"
    )


def test_a_rank_that_is_killed_is_started_again_and_nothing_but_a_step_is_lost(tmp_path, undisturbed):
    code, said = launch(tmp_path, misbehaving("SIGKILL"), "--max-restarts=1")
    assert code == 0, said
    assert losses(tmp_path / "run") == pytest.approx(undisturbed, abs=1e-5)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in row] == [
        *range(1, 7)
    ]
    starts = [row["attempt"] for row in events(tmp_path / "run", 1) if row["event"] == "start"]
    assert starts == [0, 1]
    resumed = [row["step"] for row in events(tmp_path / "run", 0) if row["event"] == "ready"]
    assert resumed[0] == 0
    assert resumed[1] in (0, 2), "the checkpoint of step 2 may still have been on its way to the disk"


@pytest.mark.parametrize(
    ("what", "blamed"),
    [("hang", r"rank 1 hangs at step 3 \(forward\)"), ("SIGSTOP", "rank 1 is stopped, gone or cut off")],
)
def test_a_rank_that_hangs_is_named_within_the_time_limit(what, blamed, tmp_path):
    recipe = misbehaving(what, run={"timeout": 6.0}, parallel={"kind": "fsdp", "reshard": "pass"})
    code, said = launch(tmp_path, recipe)
    assert code != 0
    # Both ranks keep time; the first to find it up says so.
    found = re.search(rf"error: rank (\d): no progress for \d+ s in step 3 \(\w+\): {blamed}", said)
    assert found, said
    rank = int(found[1])
    stalled, fault = events(tmp_path / "run", rank)[-2:]
    assert (stalled["event"], fault["event"], fault["error"]) == ("stalled", "fault", "Timeout")
    assert "step 3" in stalled["place"]
    where = "distributed" if rank == 0 else "misbehaving"
    assert any(where in line for line in fault["stack"]), "where the rank is"
