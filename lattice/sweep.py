"""Every arm of a study with every seed, each in a process of its own: one that fails takes no other along.

OUT/ARM/arm.toml     the resolved recipe of an arm
OUT/ARM/seed0/       its run with seed 0, as `lattice run` writes it
OUT/ARM/seed0.log    what that run printed
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lattice import atomic, preflight
from lattice.compare import comparable, unlike
from lattice.console import console, errors, say, warn
from lattice.hardware import visible_gpus
from lattice.interrupts import StopRequest
from lattice.load import recipe_of
from lattice.recipe import Recipe, RecipeError, load_recipe
from lattice.run_folder import METRICS, RECIPE, RunExists, check_same, finished, locked, read_table
from lattice.study import Arm, Study

POLL_SECONDS = 0.5
TAIL = 8192
"""Bytes at the end of metrics.jsonl that hold the last steps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One run of a study; equal to itself alone."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def recipe(self) -> Path:
        return self.folder.with_name("arm.toml")

    @property
    def seeded(self) -> Recipe:
        """The arm's recipe with this run's seed."""
        return load_recipe(self.arm.recipe, [f"run.seed={self.seed}"])

    @property
    def takes_a_gpu(self) -> bool:
        """Whether it takes one if there is one, no matter which."""
        return self.arm.recipe.run.device in ("auto", "cuda")

    @property
    def finished(self) -> bool:
        """Whether the run has taken all its steps."""
        return finished(self.folder, self.arm.recipe.run.steps) is not None

    def progress(self) -> tuple[int, float | None]:
        """Steps done and the last training loss."""
        try:
            with (self.folder / METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().splitlines()
            rows = [json.loads(line) for line in lines[-3:]]
        except (OSError, ValueError):  # not there yet, or a line is being written
            return 0, None
        losses = [row["loss"] for row in rows if "loss" in row]
        return max((row["step"] for row in rows), default=0), losses[-1] if losses else None


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    gpu: str | None
    """As CUDA_VISIBLE_DEVICES names it; None where the run sees all of them, or there is none."""
    logged: int
    """Bytes of its log that are of earlier calls."""


class Failure(NamedTuple):
    """A run whose process ended before the run was finished."""

    log: Path
    logged: int
    """Bytes of the log that are of earlier calls."""
    code: int
    """That the process ended with; of a signal that killed it the negative number, as subprocess has it."""

    def __str__(self) -> str:
        if self.code < 0:
            name = next((one.name for one in signal.Signals if one == -self.code), f"signal {-self.code}")
            lack = ", perhaps for lack of memory" if -self.code == signal.SIGKILL else ""
            return f"killed by {name}{lack} (all of it in {self.log})"
        lines = self.log.read_bytes()[self.logged :].decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        return f"{last} (exit code {self.code}; all of it in {self.log})"


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs."""

    folders: list[Path] = field(default_factory=list)
    """Of the runs that are complete, those of earlier calls among them, in the order of the arms."""
    failed: dict[str, Failure] = field(default_factory=dict)
    """Those that failed, by name."""
    stopped: str | None = None
    """The signal that stopped the sweep."""


def jobs_of(study: Study, out: Path) -> list[Job]:
    """In the order in which they are started: all arms with the first seed, then with the next, so that there
    is something to compare early."""
    return [
        Job(arm=arm, seed=seed, folder=out / arm.name / f"seed{seed}")
        for seed in study.seeds
        for arm in study.arms
    ]


def sweep(study: Study, out: Path, *, at_once: int = 1) -> Outcome:
    """Trains whatever is not finished, `at_once` runs side by side, the machine's threads and GPUs shared
    among them.

    A failed run is reported and the others go on. After SIGINT or SIGTERM, or where the sweep itself fails,
    the running ones save their state and stop; calling again goes on. Raises RecipeError where an arm cannot
    be trained here.
    """
    if at_once < 1:
        raise ValueError(f"jobs = {at_once}: must be at least 1")
    jobs = jobs_of(study, out)
    _check(jobs)
    outcome = Outcome()
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        left = deque(job for job in jobs if not job.finished)
        for job in left:
            atomic.write_file(job.recipe, job.arm.recipe.to_toml().encode())
        if left:
            say(f"{len(left)} of {len(jobs)} runs to do; they lie in '{out}'")
        stop = stack.enter_context(StopRequest())
        bars = stack.enter_context(_Bars(jobs, left))
        gpus = visible_gpus()
        side_by_side = min(at_once, sum(job.takes_a_gpu for job in left))
        if side_by_side > len(gpus) > 0:
            say(f"{side_by_side} runs at once share {len(gpus)} GPUs, and their memory")
        running = stack.enter_context(_processes())
        while left or running:
            while left and len(running) < at_once and not stop.received:
                job = left.popleft()
                running[job] = _start(job, at_once, _free(gpus, running) if job.takes_a_gpu else None)
                bars.start(job)
            if stop.received:
                break
            time.sleep(POLL_SECONDS)
            for job, (process, _, logged) in list(running.items()):
                bars.update(job)
                if (code := process.poll()) is not None:
                    del running[job]
                    bars.end(job, failed=not job.finished)
                    if not job.finished:
                        outcome.failed[job.name] = Failure(job.log, logged, code)
    if left or running:
        say(f"{stop.received}: the runs stopped and saved; the same command goes on from there")
        return Outcome(outcome.folders, outcome.failed, stop.received)
    first, *_ = study.arms
    done = [job for arm in study.arms for job in jobs if job.arm is arm and job.finished]
    if done and done[0].arm is not first:
        warn(f"arm '{first.name}' has no finished run: the others are compared with arm '{done[0].arm.name}'")
    outcome.folders.extend(job.folder for job in done)
    return outcome


def show_failures(outcome: Outcome) -> None:
    """Each run that failed, and why, on stderr."""
    for name, failure in outcome.failed.items():
        errors.print(f"{name} failed: {failure}", markup=False, soft_wrap=True)


def _check(jobs: Sequence[Job]) -> None:
    """Raises RecipeError for arms that cannot be trained here, for runs that are of another recipe than their
    arm has now, whose losses are not this arm's, and for finished ones that nothing would compare with the
    others."""
    problems: list[str] = []
    for job in jobs:
        try:
            check_same(job.folder, job.seeded)
        except RunExists as error:
            problems.append(f"arm '{job.arm.name}': {error}")
            continue
        steps = job.arm.recipe.run.steps
        if (job.folder / RECIPE).is_file() and (before := read_table(job.folder)["run"]["steps"]) != steps:
            problems.append(
                f"arm '{job.arm.name}': '{job.folder}' is a run of {before} steps, and run.steps is {steps} "
                "now: schedules that end elsewhere do not compare. Choose another directory with --out, or "
                "remove this one"
            )
    if not problems:
        recipes = [
            recipe_of(job.folder, trust_imports=True) if job.finished else job.arm.recipe for job in jobs
        ]
        if not comparable(recipes):
            problems.append(
                "runs that are finished have no evaluator with a loss in common with the others"
                f"{unlike(recipes)}. Choose another directory with --out, or remove them"
            )
    for arm in {job.arm.name: job.arm for job in jobs if not job.finished}.values():
        try:
            preflight.check(arm.recipe)
        except RecipeError as error:
            problems += [f"arm '{arm.name}': {problem}" for problem in error.problems]
    if problems:
        raise RecipeError(problems)


@contextmanager
def _processes() -> Iterator[dict[Job, Running]]:
    """For runs in processes of their own; those that are left at the end, whatever ends it, stop and save."""
    running: dict[Job, Running] = {}
    try:
        yield running
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()


def _free(gpus: Sequence[str], running: Mapping[Job, Running]) -> str | None:
    """The GPU that the fewest runs have."""
    taken = Counter(one.gpu for one in running.values())
    return min(gpus, key=taken.__getitem__, default=None)


def _start(job: Job, at_once: int, gpu: str | None) -> Running:
    # Not from the current directory (-P), whose files may have the names of packages: as `lattice run` does.
    command = [sys.executable, "-P", "-m", "lattice", "run", str(job.recipe)]
    command += ["--out", str(job.folder), "--set", f"run.seed={job.seed}"]
    environment = dict(os.environ)
    if at_once > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        logged = log.tell()
        # A session of its own: what a terminal sends to all reaches a run once, from here.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Running(process, gpu, logged)


class _Bars:
    """A bar for the study and one for each running job; lines where there is no terminal."""

    def __init__(self, jobs: Sequence[Job], left: Sequence[Job]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(left), loss="")
        self._of: dict[Job, TaskID] = {}
        self._started: dict[Job, float] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, job: Job) -> None:
        self._of[job] = self._progress.add_task(job.name, total=job.arm.recipe.run.steps, loss="")
        self._started[job] = time.monotonic()

    def update(self, job: Job) -> None:
        step, loss = job.progress()
        shown = "" if loss is None else f"loss {loss:.3f}"
        self._progress.update(self._of[job], completed=step, loss=shown)

    def end(self, job: Job, *, failed: bool) -> None:
        self._progress.remove_task(self._of.pop(job))
        self._progress.advance(self._all)
        seconds = time.monotonic() - self._started[job]
        said = f"failed; its log is {job.log}" if failed else f"finished in {seconds:,.0f} s"
        say(f"{job.name}: {said}")
