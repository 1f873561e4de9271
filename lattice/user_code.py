"""Copies of a user's own files in a run's directory, as the run began with them: files change, and move.

Kept in `imports/`, under the name of the file.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from lattice import atomic
from lattice.console import warn

FOLDER = "imports"


def keep(run: Path, imports: Sequence[str]) -> None:
    """Copies the files among the imports of a run that begins, or goes on, and says which are not what it
    began with."""
    for name, copy in _copies(run, imports).items():
        if not copy.is_file():
            atomic.write_file(copy, Path(name).read_bytes())
    found(run, imports)


def found(run: Path, imports: Sequence[str]) -> list[str]:
    """The imports of a run, with the copy in place of a file that is gone. Says so, and where a file is not
    what the run began with."""
    copies = _copies(run, imports)
    return [_one(name, copies[name]) if name in copies else name for name in imports]


def digest(imports: Sequence[str]) -> str:
    """Of the files that imports which are loaded came from, on this machine."""
    files = [name if name.endswith(".py") else sys.modules[name].__file__ for name in imports]
    content = hashlib.sha256()
    for file in filter(None, files):  # a package may be a folder without a file
        content.update(Path(file).read_bytes())
    return content.hexdigest()


def _one(name: str, copy: Path) -> str:
    if not copy.is_file():
        return name
    if not Path(name).is_file():
        _warn(f"'{name}' does not exist; in its place '{copy}', which the run began with")
        return str(copy.resolve())
    if Path(name).read_bytes() != copy.read_bytes():
        _warn(f"'{name}' is not what the run began with, which is '{copy}'; what follows is by the new code")
    return name


def _copies(run: Path, imports: Sequence[str]) -> dict[str, Path]:
    """The place of each file's copy, none twice."""
    places: dict[str, Path] = {}
    for name in imports:
        if name.endswith(".py") and name not in places:
            taken = [place.name for place in places.values()]
            places[name] = run / FOLDER / free_name(Path(name).stem, taken)
    return places


def free_name(stem: str, taken: Collection[str]) -> str:
    """The name of a Python file, with a number where it would be one of those that are taken."""
    name, number = f"{stem}.py", 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}.py"
    return name


@cache
def _warn(text: str) -> None:
    """Once a process: a command may read a run's recipe several times."""
    warn(text)
