"""Checkpoints as safetensors files, written beside the training, whole or not at all.

A checkpoint is the directory `step-00000123`: safetensors files, `facts.json`, and `manifest.json` with the
size and SHA-256 of the others. It is written as `.writing-step-00000123`, forced to the disk and only then
renamed, so that a save that is killed or runs out of space never stands in for the last good one.
Loading never executes code from a checkpoint (see `_tensors.py`).
"""

from __future__ import annotations

import json
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattice.components.checkpoint import _folder
from lattice.components.checkpoint._manifest import (
    CheckpointError,
    CorruptCheckpoint,
    read_json,
    seal,
    step_of,
    verify,
)
from lattice.components.checkpoint._tensors import read, start_writing
from lattice.protocols import Checkpoint, Checkpointer
from lattice.registry import register

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CheckpointError", "CorruptCheckpoint", "DcpCheckpoint", "DcpCheckpointer"]

FACTS = "facts.json"


@register("checkpoint", "dcp")
@dataclass(frozen=True, kw_only=True)
class DcpCheckpoint(Checkpoint):
    """Sharded safetensors checkpoints, written beside the training, whole or not at all.

    Needs room for `keep` + 1 checkpoints on the disk and for one copy of the state in CPU memory."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Complete checkpoints that are kept, the latest ones."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""

    def __post_init__(self) -> None:
        for option in ("every", "keep"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} = {getattr(self, option)}: must be 1 or more")

    def build(self, folder: Path) -> Checkpointer:
        """With several ranks all call it, after `init_process_group`, with one folder that all see."""
        return DcpCheckpointer(folder, keep=self.keep, asynchronous=self.asynchronous)


class DcpCheckpointer(Checkpointer):
    """Of several ranks, rank 0 seals and names the directory once all have written.

    Left for later, with many ranks: each verifies all files when loading, and each falls back by itself.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool) -> None:
        self._folder = folder
        self._keep = keep
        self._asynchronous = asynchronous
        self._rank = _rank()
        self._group = _own_group()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """`tensors` (nested dicts) are copied before this returns and may then be changed. Waits for the
        save before, and raises OSError if that one failed; calling again then saves."""
        written_facts = json.dumps(facts, indent=1)
        self.wait()
        self._tidy()
        writing = _folder.writing_path(self._folder, step)
        tensors_written = start_writing(writing, tensors, self._group)
        self._saving = self._worker.submit(self._complete, step, writing, tensors_written, written_facts)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def poll(self) -> None:
        """Raises OSError if the save in flight has failed already; never waits."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def _complete(self, step: int, writing: Path, tensors_written: Future[Any], facts: str) -> None:
        """In the worker thread: from tensors being written to a complete checkpoint."""
        failure: BaseException | None = None
        try:
            tensors_written.result()
            if self._rank == 0:
                (writing / FACTS).write_text(facts)
                seal(writing, step)
                _folder.publish(writing, step, self._keep)
        except BaseException as error:  # DCP's own exception is no Exception
            failure = error
            if self._rank == 0:
                _folder.clean(self._folder)
        if _any_failed(failure is not None, self._group):
            raise self._explained(step, failure) from failure

    def _explained(self, step: int, failure: BaseException | None) -> OSError:
        cause = _cause(failure)
        good = self.latest()
        last = f"the last good one is step {step_of(good)} in {good}" if good else "there is no earlier one"
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        error = OSError(f"checkpoint of step {step} could not be saved: {reason} ({self._folder}); {last}")
        error.errno = getattr(cause, "errno", None)
        return error

    def candidates(self) -> list[Path]:
        return _folder.candidates(self._folder)

    def latest(self) -> Path | None:
        return next(iter(self.candidates()), None)

    def load(self, path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
        """Raises CorruptCheckpoint for damaged files and CheckpointError for tensors of other names, shapes
        or number formats, both before anything is changed. Top-level entries of the checkpoint that
        `tensors` lacks are left out: evaluation asks for the model only."""
        verify(path)
        facts = read_json(path / FACTS)
        if not isinstance(facts, dict):
            raise CorruptCheckpoint(f"{path / FACTS} must hold a JSON object")
        read(path, tensors, self._group)
        return facts

    def _tidy(self) -> None:
        """Not when it is built: whoever only reads must not touch what a live run is writing."""
        if self._rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            _folder.clean(self._folder)

    def load_latest(self, tensors: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """For the run itself: also removes what a killed save left behind."""
        self._tidy()
        candidates = self.candidates()
        for path in candidates:
            try:
                return path, self.load(path, tensors)
            except CorruptCheckpoint as error:
                warnings.warn(f"{error}; the checkpoint before it is tried", stacklevel=2)
        if candidates:
            raise CheckpointError(f"none of the {len(candidates)} checkpoints in {self._folder} is intact")
        return None


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _own_group() -> ProcessGroup | None:
    """A group for checkpoints alone: they talk from their own thread while training uses the others."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: ProcessGroup = dist.new_group(backend="gloo")
    return group


def _any_failed(failed: bool, group: ProcessGroup | None) -> bool:
    if group is None:
        return failed
    import torch
    import torch.distributed as dist

    count = torch.tensor(int(failed))
    dist.all_reduce(count, group=group)
    return bool(count)


def _cause(failure: BaseException | None) -> BaseException:
    """What lies behind DCP's exception, which lists the failures by rank."""
    if failure is None:
        return RuntimeError("another rank failed")
    by_rank: dict[int, tuple[BaseException, Any]] = getattr(failure, "failures", {})
    return next((error for error, _ in by_rank.values()), failure)
