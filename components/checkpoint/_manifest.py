"""What makes a checkpoint directory complete: its manifest, written last, checked before anything is read.

`manifest.json` holds the step and, for every other file, its size in bytes and its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
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


def entries(paths: Iterable[Path]) -> dict[str, Any]:
    """What the manifest says of files that were just written; on return they are on the disk."""
    files: dict[str, Any] = {}
    for path in sorted(paths):
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    return files


def seal(folder: Path, step: int, files: dict[str, Any]) -> None:
    """Writes the manifest of `files`; on return it is on the disk. Raises OSError for a tensor file that is
    not among them."""
    for found in sorted(folder.glob("*.safetensors")):  # may lack what others wrote just now, if shared
        if found.name not in files:
            raise OSError(f"{found} was written by nobody")
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "step": step, "files": files}, indent=1))
    sync(manifest)
    sync(folder)


def verify(folder: Path, files: dict[str, Any]) -> None:
    """Raises CorruptCheckpoint that names the first of `files` that is not as it was written."""
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """Every file's size and SHA-256. Raises CorruptCheckpoint where that cannot be known, and for files of
    tensors or facts that are not listed: they would be read all the same."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        listed = manifest["files"].items()
        files = {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in listed}
        version, step = manifest["format"], manifest["step"]
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    for name in files:
        if not _FILE.fullmatch(name):  # nor one without end, such as a device
            raise CorruptCheckpoint(f"{path} lists {name!r}, which is not the name of a file beside it")
    if version != 1:
        raise CorruptCheckpoint(f"{path}: format {version} is unknown to this version, which knows format 1")
    if step != step_of(folder):
        raise CorruptCheckpoint(f"{path} is of step {step}, not of {folder.name}")
    for found in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        if found.name not in files and found.name != MANIFEST:
            raise CorruptCheckpoint(f"{found} does not belong to the checkpoint: {MANIFEST} does not list it")
    return files


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
