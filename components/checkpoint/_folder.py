"""The directories of a run's checkpoints, and the order of renames that keeps one of them good at any moment.

`step-00000123` is complete, whatever else there is: `.writing-…` is a save that goes on or was killed,
`.replaced-…` the earlier checkpoint of the same step while the new one takes its name, `.removed-…` one that
is being deleted, `abandoned-…` a later one that the run has come back from.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from lattice.components.checkpoint._manifest import step_name, step_of, sync

_WRITING, _REPLACED, _REMOVED, _ABANDONED = ".writing-", ".replaced-", ".removed-", "abandoned-"


def writing_path(folder: Path, step: int) -> Path:
    return folder / f"{_WRITING}{step_name(step)}"


def candidates(folder: Path) -> list[Path]:
    """The complete checkpoints, the latest step first; none where there is no such folder. Raises OSError
    where it cannot be listed: that must not pass for a run without checkpoints."""
    try:
        found = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def clean(folder: Path) -> None:
    """Removes what a killed or failed save left behind, and takes back what it was about to replace."""
    for path in folder.glob(f"{_REPLACED}*"):
        final = folder / path.name.removeprefix(_REPLACED)
        if not final.exists():
            path.rename(final)
    for prefix in (_WRITING, _REPLACED, _REMOVED):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def publish(writing: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Gives a sealed directory its final name, then removes all but the last `keep` and those of every
    `keep_every`-th step."""
    folder = writing.parent
    final = folder / step_name(step)
    for path in candidates(folder):
        if (step_of(path) or 0) > step:
            _set_aside(path, step)
    replaced = folder / f"{_REPLACED}{final.name}"
    if final.exists():
        final.rename(replaced)
    writing.rename(final)
    sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    for path in candidates(folder)[keep:]:
        if keep_every is not None and (step_of(path) or 0) % keep_every == 0:
            continue
        # Deleting takes time: under its own name a half-deleted checkpoint would look like a damaged one.
        removed = path.rename(folder / f"{_REMOVED}{path.name}")
        shutil.rmtree(removed, ignore_errors=True)


def _set_aside(path: Path, step: int) -> None:
    """A later checkpoint, from before the run came back to an earlier step, must not pass for the latest."""
    aside = path.with_name(f"{_ABANDONED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    warnings.warn(f"{path.name} is later than step {step}, which is saved now: kept as {aside}", stacklevel=2)
