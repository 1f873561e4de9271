"""What makes a checkpoint directory complete: its manifest, written last, checked before anything is read.

`manifest.json` holds the step and, for every other file, its size in bytes and its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_CHUNK = 1 << 22
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says why."""


class CorruptCheckpoint(CheckpointError):
    """Files that are missing, cut short or altered: an earlier checkpoint may still do."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint directory's name; None if it is not such a name."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path, step: int) -> None:
    """Writes the manifest of all files in `folder`; on return all of it is on the disk."""
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "step": step, "files": files}, indent=1))
    sync(manifest)
    sync(folder)


def verify(folder: Path) -> None:
    """Raises CorruptCheckpoint that names the first file that is not as it was written."""
    files = _files(folder)
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                raise CorruptCheckpoint(f"{path} has {size} bytes where {expected['size']} were written")
            if _sha256(path) != expected["sha256"]:
                raise CorruptCheckpoint(f"{path} is not what was written: its checksum differs")
        except FileNotFoundError:
            raise CorruptCheckpoint(f"{path} is missing") from None
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    # The reader would take every tensor file that it finds, and the facts.
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        if path.name not in files and path.name != MANIFEST:
            raise CorruptCheckpoint(f"{path} does not belong to the checkpoint: {MANIFEST} does not list it")


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    manifest = read_json(path)
    try:
        entries = manifest["files"].items()
        files = {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in entries}
        version, step = manifest["format"], manifest["step"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    for name in files:
        if not _FILE.fullmatch(name):  # of a file elsewhere, or of a device that has no end
            raise CorruptCheckpoint(f"{path} lists {name!r}, which is no file of the checkpoint")
    if version != 1:
        raise CorruptCheckpoint(f"{path}: format {version} is unknown to this version, which knows format 1")
    if step != step_of(folder):
        raise CorruptCheckpoint(f"{path} is of step {step}, not of {folder.name}")
    return files


def read_json(path: Path) -> Any:
    """Raises CorruptCheckpoint where there is none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path} is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
