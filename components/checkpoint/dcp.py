"""Checkpoints as safetensors files, written beside the training, whole or not at all.

A checkpoint is the directory `step-00000123`: safetensors files, `facts.json`, and `manifest.json` with the
size and SHA-256 of the others. It is written as `.writing-step-00000123`, forced to the disk and only then
renamed, so that a save that is killed or runs out of space never stands in for the last good one.
Loading never executes code from a checkpoint (see `_tensors.py`).
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattice.components.checkpoint import _folder
from lattice.components.checkpoint._manifest import (
    CheckpointError,
    CorruptCheckpoint,
    entries,
    read_manifest,
    seal,
    step_of,
    verify,
)
from lattice.components.checkpoint._ranks import Ranks
from lattice.components.checkpoint._saving import Saving
from lattice.components.checkpoint._tensors import flatten, prepare_reading, prepare_writing, written_files
from lattice.protocols import Checkpoint, Checkpointer, Held
from lattice.registry import register

__all__ = ["CheckpointError", "CorruptCheckpoint", "DcpCheckpoint", "DcpCheckpointer"]

FACTS = "facts.json"


@register("checkpoint", "dcp")
@dataclass(frozen=True, kw_only=True)
class DcpCheckpoint(Checkpoint):
    """Sharded safetensors checkpoints, written beside the training, whole or not at all.

    Saved by any number of ranks in any layout, loaded by any other. Needs room on the disk for one checkpoint
    more than are kept and in CPU memory for one copy of what a rank holds."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Complete checkpoints that are kept, the latest ones."""
    keep_every: int | None = None
    """Those whose step is a multiple of this are kept for ever beside them; none if left out."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""

    def __post_init__(self) -> None:
        for option in ("every", "keep"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} = {getattr(self, option)}: must be 1 or more")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise ValueError(
                f"keep_every = {self.keep_every}: must be a multiple of every = {self.every}, or left out"
            )

    def build(self, folder: Path) -> Checkpointer:
        """With several ranks all call it, after `init_process_group`, with one folder that all see."""
        return DcpCheckpointer(folder, self)


class DcpCheckpointer(Checkpointer):
    """Of several ranks, all call the same methods in the same order.

    Rank 0 decides what there is: the candidates, the manifest and the facts are what it reads. Each rank
    writes its shards, hashes what it wrote, and verifies its share of the files when loading; rank 0 seals
    and names the directory once all have written. What fails on one rank fails on all with the same
    exception: `save`, `wait`, `load`, `load_latest` and `candidates` at that call, and of the calls of `poll`
    the same one on every rank, which is why all count them. Where a rank is gone, its neighbours notice; the
    others do when those end, so a rank that has failed ends without `wait`. In any other case `wait` comes
    last: a save does not outlive the process.
    """

    def __init__(self, folder: Path, options: DcpCheckpoint) -> None:
        self._folder = folder
        self._options = options
        self._ranks = Ranks()
        self._saving: Saving | None = None
        self._used = False

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """`tensors` (nested dicts) are copied before this returns and may then be changed; the facts are rank
        0's. Waits for the save before, and raises OSError if that one failed; calling again then saves."""
        written_facts = json.dumps(facts, indent=1)
        flat = flatten(tensors)
        self.wait()
        steps = set(self._ranks.gather(step))
        if len(steps) > 1:
            raise ValueError(f"the ranks save different steps: {sorted(steps)}")
        try:
            self._ranks.from_first(self._tidy)
        except OSError as error:
            raise self._explained(step, error) from error
        write = prepare_writing(_folder.writing_path(self._folder, step), flat, self._ranks)
        self._saving = Saving()
        # A daemon: a rank whose training has failed must not wait here for the others, who wait for it.
        arguments = (self._saving, step, write, written_facts)
        threading.Thread(target=self._complete, args=arguments, name="checkpoint", daemon=True).start()
        if not self._options.asynchronous:
            self.wait()

    def wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.outcome.result()

    def poll(self) -> None:
        """Called once a step. Raises OSError if the save in flight has failed, at the same poll on all ranks;
        never waits for it to end."""
        if self._saving is not None and self._saving.poll():
            self.wait()

    def _complete(self, saving: Saving, step: int, write: Callable[[], None], facts: str) -> None:
        """In a thread of its own: from a copy of the tensors to a complete checkpoint."""
        writing = _folder.writing_path(self._folder, step)
        try:
            self._write(write)
            mine = self._ranks.together(lambda: self._finish_mine(writing, facts))
            files = {name: entry for one in self._ranks.gather(mine) for name, entry in one.items()}
            self._ranks.from_first(lambda: self._publish(writing, step, files))
            saving.outcome.set_result(None)
        except Exception as error:
            explained = self._explained(step, error)
            explained.__cause__ = error
            saving.fail(self._ranks, explained)

    def _write(self, write: Callable[[], None]) -> None:
        """Until all ranks have written. Raises what the first to fail raised."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            write()
        except CheckpointException as error:  # on all ranks; no Exception; it lists the failures by rank
            raise next(cause for cause, _ in error.failures.values()) from error
        except Exception as error:  # in between what DCP agrees on
            raise self._ranks.lost(error) from error

    def _finish_mine(self, writing: Path, facts: str) -> dict[str, Any]:
        """Until this rank's files are on the disk; returns what the manifest says of them."""
        mine = written_files(writing, self._ranks)
        if self._ranks.rank == 0:
            mine.append(writing / FACTS)
            mine[-1].write_text(facts)
        return entries(mine)

    def _publish(self, writing: Path, step: int, files: dict[str, Any]) -> None:
        seal(writing, step, files)
        _folder.publish(writing, step, self._options.keep, self._options.keep_every)

    def _explained(self, step: int, cause: Exception) -> OSError:
        """On all ranks, in rank 0's words."""
        last = self._last_good() if self._ranks.rank == 0 else ""
        try:
            last = self._ranks.first(last)
        except OSError:  # a rank is gone
            last = last or self._last_good()
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        error = OSError(f"checkpoint of step {step} could not be saved: {reason} ({self._folder}); {last}")
        error.errno = getattr(cause, "errno", None)
        return error

    def _last_good(self) -> str:
        """Says so, after a failed save, of which rank 0 removes the remains."""
        try:
            if self._ranks.rank == 0:
                _folder.clean(self._folder)
            good = next(iter(_folder.candidates(self._folder)), None)
        except OSError as error:
            return f"what there is cannot be read: {error.strerror}"
        return f"the last good one is step {step_of(good)} in {good}" if good else "there is no earlier one"

    def candidates(self) -> list[Path]:
        self._settle()
        names = self._ranks.from_first(lambda: [path.name for path in _folder.candidates(self._folder)])
        return [self._folder / name for name in names]

    def latest(self) -> Path | None:
        return next(iter(self.candidates()), None)

    def load(self, path: Path, tensors: Held) -> dict[str, Any]:
        """Raises CorruptCheckpoint for damaged files and CheckpointError for tensors of other names, shapes
        or number formats, both before anything is changed. Top-level entries of the checkpoint that
        `tensors` lacks are left out: evaluation asks for the model only."""
        self._settle()
        files = self._ranks.from_first(lambda: read_manifest(path))
        share = dict(sorted(files.items())[self._ranks.rank :: self._ranks.size])
        self._ranks.together(lambda: verify(path, share))
        facts = self._ranks.from_first(lambda: _read_facts(path / FACTS))
        held = tensors(facts) if callable(tensors) else tensors
        fill = self._ranks.together(lambda: prepare_reading(path, held))
        self._ranks.together(fill)
        return facts

    def _settle(self) -> None:
        """Until a save in flight has ended, well or not: the ranks talk about one thing at a time."""
        if self._saving is not None:
            concurrent.futures.wait([self._saving.outcome])

    def _tidy(self) -> None:
        """Not when it is built: whoever only reads must not touch what a live run is writing."""
        if self._used and not self._folder.is_dir():
            warnings.warn(f"{self._folder} has vanished with its checkpoints: made anew", stacklevel=2)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._used = True
        _folder.clean(self._folder)

    def load_latest(self, tensors: Held) -> tuple[Path, dict[str, Any]] | None:
        """For the run itself: also removes what a killed save left behind."""
        self._settle()
        self._ranks.from_first(self._tidy)
        candidates = self.candidates()
        for path in candidates:
            try:
                return path, self.load(path, tensors)
            except CorruptCheckpoint as error:
                if self._ranks.rank == 0:
                    warnings.warn(f"{error}; the checkpoint before it is tried", stacklevel=2)
        if candidates:
            raise CheckpointError(f"none of the {len(candidates)} checkpoints in {self._folder} is intact")
        return None


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise CorruptCheckpoint(f"{path} holds a {type(facts).__name__}, not the facts of a checkpoint")
    return facts
