"""A run's directory: the recipe it follows, a line of metrics a step, and its summary.

recipe.toml       resolved, with the versions and the commit it ran with
imports/          the user's own files that it names, as they were
metrics.jsonl     a line a step, and a line an evaluation
tensorboard/  checkpoints/  tokenizer/
summary.json      written at the end
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

import lattice
from lattice import atomic, rank_log, toml_source, user_code
from lattice.recipe import Recipe, RecipeError

RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
HOW_COMPUTED = (
    "run.log_every",
    "run.micro_batch",
    "run.device",
    "run.deterministic",
    "run.timeout",
    "data.workers",
    "data.verify",
    "parallel",
    "activation_checkpoint",
    "compile",
    "metrics",
    "evaluators",
    "checkpoint",
    "imports",
)
"""Options and tables that say how a run is computed, on which machine, and what is seen of it; not what is
computed."""
MAY_DIFFER = ("run.steps", *HOW_COMPUTED)
"""What may change between the parts of an interrupted run without making it another run."""


class RunExists(ValueError):
    """The directory holds a run of another recipe."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the directory for one process; the lock goes with the process, whatever becomes of those that it
    forks. Raises RunExists, CannotWrite."""
    atomic.make_folder(folder)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunExists(
                f"another process is training in '{folder}': choose another with --out"
            ) from error
        except OSError as error:  # of a network file system, say, that is mounted without locks
            raise atomic.CannotWrite(
                f"'{folder}' cannot be locked for one process: {error.strerror or error}: choose a directory "
                "on another file system with --out"
            ) from error
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)


_locks = set[TextIO]()
"""Held by this process. A lock belongs to the open file, which a forked process has open as well."""


def _in_child() -> None:
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_in_child)


def open_run(folder: Path, recipe: Recipe) -> None:
    """Makes the directory a run of this recipe."""
    user_code.keep(folder, recipe.imports)
    atomic.write_file(folder / RECIPE, (provenance() + recipe.to_toml()).encode())


def check_same(folder: Path, recipe: Recipe) -> None:
    """Raises RunExists where the directory holds a run of another recipe, or what is left of one."""
    if not (folder / RECIPE).is_file():
        left = [name for name in (METRICS, SUMMARY, CHECKPOINTS) if (folder / name).exists()]
        if left:
            raise RunExists(
                f"'{folder}' holds {left[0]} but no {RECIPE}: is of no run that can go on. Choose another "
                "directory with --out, or remove this one"
            )
        return
    different = _differences(read_table(folder), recipe.table())
    if different:
        raise RunExists(
            f"'{folder}' holds a run of another recipe; what differs: {'; '.join(different)}. "
            "Choose another directory with --out, or remove this one"
        )


def is_run(folder: Path) -> bool:
    """Whether the directory holds a recipe and a trace of its training: a recipe.toml alone may be one that
    somebody wrote."""
    traces = (rank_log.FOLDER, CHECKPOINTS, METRICS, SUMMARY)
    return (folder / RECIPE).is_file() and any((folder / name).exists() for name in traces)


def read_table(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run, as a table. Raises FileNotFoundError, RecipeError."""
    path = folder / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' holds no run: {RECIPE} is missing")
    try:
        return toml_source.read(path, str(path)).table
    except toml_source.TomlError as error:
        raise RecipeError([str(error)]) from error


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {before!r} there, {after!r} here"
        for key, (before, after) in differing(_without(MAY_DIFFER, old), _without(MAY_DIFFER, new)).items()
    ]


def trained_as(recipe: Recipe) -> dict[str, Any]:
    """The options that decide what a run computes, but for its seed, by their dotted keys: runs that have the
    same differ by chance alone."""
    return _without(("run.seed", *HOW_COMPUTED), recipe.table())


def _without(keys: Sequence[str], table: dict[str, Any]) -> dict[str, Any]:
    """The options of nested tables, but for those at and beneath `keys`."""
    return {
        key: value
        for key, value in leaves(table).items()
        if not any(key == left_out or key.startswith(f"{left_out}.") for left_out in keys)
    }


def differing(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of options by their keys those that are not the same in both, with what each has."""
    return {
        key: (old.get(key, "unset"), new.get(key, "unset"))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def leaves(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The options of nested tables by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


def provenance() -> str:
    """Versions and commit, as TOML comments."""
    names = ("torchdata", "safetensors", "tokenizers", "numpy")
    # its own without metadata, which a checkout that is on PYTHONPATH alone has not
    found = {"lattice": lattice.__version__, **{name: importlib.metadata.version(name) for name in names}}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    # torch's own attribute names the build as well: 2.11.0+cu130
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, {versions}"]
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        lines.append(f"commit {commit}")
    except (OSError, subprocess.SubprocessError):
        lines.append("commit unknown: installed without its repository")
    return "".join(f"# {line}\n" for line in ["resolved by lattice", *lines]) + "\n"


def finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that has taken `steps` steps or more; None of any other. Raises ValueError where
    it cannot be read."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
        taken = int(summary["steps"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: no summary of a run: {error!r}; without this file the run goes on from its last "
            "checkpoint"
        ) from error
    return summary if taken >= steps else None


class MetricsFile:
    """metrics.jsonl, one JSON object a line; lines of what a resumed run does again are dropped.

    Those are the steps after `first_step` and, if it `evaluates_again`, the evaluations of that step.
    """

    def __init__(self, folder: Path, first_step: int, *, evaluates_again: bool = False) -> None:
        path = folder / METRICS
        lines = _lines(path)
        last = {True: first_step, False: first_step - 1 if evaluates_again else first_step}
        parsed = [(line, row) for line in lines if (row := _row(line))]
        kept = [(line, row) for line, row in parsed if row["step"] <= last["loss" in row]]
        if len(kept) < len(lines):
            atomic.write_file(path, "".join(line for line, _ in kept).encode())
        at_first = [row for _, row in kept if row["step"] == first_step and "loss" not in row]
        self.evaluated = sorted({key.partition("/")[0] for row in at_first for key in row if "/" in key})
        """The evaluators whose figures of `first_step` are there."""
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def log(self, values: dict[str, Any]) -> None:
        """Raises CannotWrite."""
        with atomic.naming(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Until all lines are on the disk, as before a checkpoint that goes on from them."""
        with atomic.naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with closing(self._file):
            self.sync()


def _lines(path: Path) -> list[str]:
    """Of a file that may not be there, or end in bytes that a crash left."""
    return path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []


def _row(line: str) -> dict[str, Any] | None:
    """The content of a line; None for one that a kill cut short."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that is being written; none where there is no file."""
    return [row for line in _lines(path) if (row := _row(line))]


def training_steps(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every training step so far, in order; none where the file is not there."""
    return [row for row in read_metrics(folder / METRICS) if "loss" in row]


def peak_memory_mib(device: torch.device) -> float:
    """Of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
