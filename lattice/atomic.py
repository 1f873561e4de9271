"""Files that are either complete or absent, and errors of writing that name the file."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Suffix of a file that is still being written; safe to delete when nobody writes."""


class CannotWrite(ValueError):
    """A file could not be written, for instance because the disk is full."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into CannotWrite that names `path`: a failed write() does not."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """A directory and those above it, where they do not exist. Raises CannotWrite that names it."""
    with naming(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise CannotWrite(f"{path} is no directory") from error


def check_writable(path: Path) -> None:
    """Raises CannotWrite, before anything is computed, where nothing could be kept. Leaves no new file."""
    make_folder(path.parent)
    new = not path.exists()
    with naming(path):
        path.open("a", encoding="utf-8").close()
        if new:
            path.unlink()


def append_line(path: Path, line: str) -> None:
    """Adds a line to the file, which need not be there. Raises CannotWrite with its name."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_file(path: Path, content: bytes) -> None:
    """Writes the whole file or leaves the old one; two writers at once do not mix.

    Raises CannotWrite with the file's name.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """`write_file` of indented JSON, the same bytes for the same value."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode("ascii"))
