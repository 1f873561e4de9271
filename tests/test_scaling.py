"""The scripts in examples/ as a scheduler runs them, and the commands that docs/scaling.md names."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

import lattice
from lattice.cli import app

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
STUBS = {
    "scontrol": """
case "$1 $2" in
    "show hostnames") echo node1; echo node2 ;;
    "show job") echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}" ;;
    *) echo "scontrol $*" >> "$TOLD" ;;
esac
""",
    "scancel": 'echo "scancel $*" >> "$TOLD"; kill -TERM "$(cat "$STEP")"',
    "srun": """
echo "srun $*" >> "$TOLD"
echo $$ > "$STEP.tmp"
trap 'sleep 0.2; echo saved >> "$TOLD"; exit 1' TERM
mv "$STEP.tmp" "$STEP"
[ -n "${FINISHES:-}" ] && exit 0
while :; do sleep 0.05; done
""",
}


def test_scripts_parse():
    assert SCRIPTS
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK), script


@pytest.fixture
def cluster(tmp_path):
    """A cluster's commands that note how they were called."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    told, step = tmp_path / "told", tmp_path / "step"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TOLD": str(told),
        "STEP": str(step),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    return environment, told, step


@pytest.fixture
def job(cluster):
    """Starts the script and waits until the run has started."""
    environment, _, step = cluster

    def start(**more):
        script = [str(ROOT / "examples" / "slurm.sh"), "r.toml", "--out", "runs/a"]
        process = subprocess.Popen(script, env=environment | more, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not step.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    return start


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_at_the_end_of_its_time_a_job_saves_and_is_queued_again_but_not_when_it_is_cancelled(
    cluster, job, number, again
):
    _, told, _ = cluster
    process = job()
    process.send_signal(number)
    assert process.wait(30) == 1
    start, *then = told.read_text().splitlines()
    assert "--nnodes 2" in start
    assert "--rdzv-endpoint node1:29400" in start
    assert start.endswith("-m lattice run r.toml --out runs/a")
    assert then == ["scancel --signal=TERM 7", "saved"] + ["scontrol requeue 7"] * again


@pytest.mark.parametrize(("when", "again"), [("2026-01-02T03:04:05", True), ("None", False)])
def test_a_preempted_job_of_which_the_steps_alone_are_told_is_queued_again(cluster, job, when, again):
    _, told, step = cluster
    process = job(PREEMPTED=when)
    os.kill(int(step.read_text()), signal.SIGTERM)
    assert process.wait(30) == 1
    assert told.read_text().splitlines()[1:] == ["saved"] + ["scontrol requeue 7"] * again


def test_a_finished_job_is_not(cluster):
    environment, told, _ = cluster
    script = [str(ROOT / "examples" / "slurm.sh"), "r.toml"]
    subprocess.run(script, env={**environment, "FINISHES": "1"}, check=True)
    assert len(told.read_text().splitlines()) == 1


def commands() -> list[list[str]]:
    """The arguments of each `lattice …` in the blocks of the page."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [["", *shlex.split(line, comments=True)] for line in lines]
    return [
        one[place + 2 :]
        for one in words
        for place, pair in enumerate(pairwise(one))
        if pair in (("", "lattice"), ("-m", "lattice"))
    ]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_page_names_commands_that_exist(arguments):
    """With these options, and where it names a recipe of the project, with these keys."""
    _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    recipe = bound.arguments.get("recipe")
    if recipe is not None and (ROOT / recipe).is_file():
        lattice.load_recipe(ROOT / recipe, bound.arguments.get("set_") or [])


def test_the_page_has_commands_to_check():
    assert {arguments[0] for arguments in commands()} >= {"run", "plan", "prepare"}
