"""What a preparation has finished, kept so that it can be interrupted at any moment."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lattice.atomic import PARTIAL, make_folder, write_json
from lattice.console import plural
from lattice.protocols import Codec
from lattice.shard_writer import INDEX_BYTES, JOURNAL, MANIFEST, checksum, manifest, token_dtype

LOCK = "prepare.lock"
log = logging.getLogger(__name__)


def command(settings: dict[str, Any], out: Path) -> str:
    """The `lattice prepare` command of these settings."""
    spec = settings["tokenizer"]
    words = ["lattice", "prepare", *settings["sources"], "--out", str(out)]
    words += spec.split() if spec.startswith("--") else ["--tokenizer", spec]
    if settings["validation_fraction"]:
        words += ["--validation-fraction", str(settings["validation_fraction"])]
    if settings["text_key"] != "text":
        words += ["--text-key", settings["text_key"]]
    return shlex.join(words)


class Journal:
    """The state of one directory: `finished` is its manifest if there is nothing left to do."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Raises ValueError where the directory holds another preparation."""
        self.folder = folder
        self.settings = settings
        self.finished: dict[str, Any] | None = None
        self.fingerprint: str | None = None
        self.position = (0, 0)
        self.empty = 0
        splits = ["train", "validation"] if settings["validation_fraction"] else ["train"]
        self.splits: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        if (folder / MANIFEST).exists():
            self.finished = _load(folder / MANIFEST)
            if self.finished.get("checksum") != checksum(self.finished):
                raise ValueError(f"{folder / MANIFEST} is damaged: delete '{folder}' and start again")
            before = {**self.finished.get("settings", {}), "files": self.finished.get("sources")}
            self._same(before, "is already prepared")
        elif (folder / JOURNAL).exists():
            saved = _load(folder / JOURNAL)
            if saved.get("checksum") != checksum(saved):
                raise ValueError(f"{folder / JOURNAL} is damaged: delete '{folder}' and start again")
            self._resume(saved)
        else:
            self._save()
        for partial in folder.glob(f"**/*{PARTIAL}"):
            partial.unlink()

    def begin(self, codec: Codec) -> None:
        """Raises ValueError if the shards so far were made with another tokenizer, or are damaged."""
        if self.fingerprint not in (None, codec.fingerprint):
            raise ValueError(
                f"{self.folder} was begun with the tokenizer {self.fingerprint}, now it is "
                f"{codec.fingerprint}: restore the tokenizer or choose a new directory"
            )
        self._check_sizes(np.dtype(token_dtype(codec.vocab_size)).itemsize)
        self.fingerprint = codec.fingerprint
        self._save()

    def complete(
        self, splits: dict[str, list[dict[str, Any]]], position: tuple[int, int], empty: int
    ) -> None:
        """Records that everything before `position` (source, record) is in `splits`' shards."""
        self.splits = {split: list(shards) for split, shards in splits.items()}
        self.position, self.empty = position, empty
        self._save()

    def finish(self, codec: Codec, tokenizer: dict[str, str]) -> dict[str, Any]:
        """Writes the manifest and ends the journal. Raises ValueError if there is no document to train on."""
        if not any(self.splits.values()):
            raise ValueError(f"the sources hold no text: {', '.join(self.settings['sources'])}")
        if not self.splits["train"]:
            held_out = sum(shard["documents"] for shard in self.splits["validation"])
            raise ValueError(
                f"validation_fraction = {self.settings['validation_fraction']}: holds out all there is "
                f"({plural(held_out, 'document')}); give a lower one, or more documents, and a new directory"
            )
        result = manifest(
            codec,
            tokenizer,
            self.splits,
            empty_documents=self.empty,
            sources=self.settings["files"],
            settings={name: value for name, value in self.settings.items() if name != "files"},
        )
        write_json(self.folder / MANIFEST, result)
        (self.folder / JOURNAL).unlink()
        return result

    def describe(self) -> str:
        shards = [shard for split in self.splits.values() for shard in split]
        return (
            f"Complete and kept: {plural(len(shards), 'shard')}, "
            f"{plural(sum(s['documents'] for s in shards), 'document')}, "
            f"{plural(sum(s['tokens'] for s in shards), 'token')}."
        )

    def _resume(self, saved: dict[str, Any]) -> None:
        source, record = saved["position"]
        before = {**saved["settings"], "files": self._mended(saved["settings"]["files"], source, record)}
        self._same(before, "holds an unfinished preparation")
        self.fingerprint, self.empty, self.splits = saved["fingerprint"], saved["empty"], saved["splits"]
        self.position = (source, record)

    def _mended(self, before: list[Any], source: int, record: int) -> list[Any]:
        """The files as they were, but those that are not yet read to their end as they are now: an error in
        one of them is what a preparation may have stopped for."""
        now: list[Any] = self.settings["files"]
        if [one["file"] for one in before] != [one["file"] for one in now]:
            return before
        if record and before[source] != now[source]:
            log.warning(
                "%s has changed: its first %s are kept as they were read",
                now[source]["file"],
                plural(record, "document"),
            )
        return before[:source] + now[source:]

    def _check_sizes(self, token_bytes: int) -> None:
        for shard in (shard for shards in self.splits.values() for shard in shards):
            sizes = {"file": shard["tokens"] * token_bytes, "index": shard["documents"] * INDEX_BYTES}
            for key, expected in sizes.items():
                path = self.folder / shard[key]
                actual = path.stat().st_size if path.exists() else 0
                if actual != expected:
                    raise ValueError(
                        f"{path} was complete with {expected} bytes, now it has {actual}: restore it, or "
                        f"delete {self.folder} and start again"
                    )

    def _same(self, saved: dict[str, Any], what: str) -> None:
        if not saved.get("sources"):
            raise ValueError(f"{self.folder} {what} of another origin: choose another directory")
        for name, value in self.settings.items():
            before = saved.get(name)
            if before != value:
                if name == "files" and isinstance(before, list):
                    before, value = _first_difference(before, value)
                raise ValueError(
                    f"{self.folder} {what} with {name} = {before!r}, not {value!r}: choose another "
                    f"directory, or run it as before: {command(saved, self.folder)}"
                )

    def _save(self) -> None:
        content = {
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "position": self.position,
            "empty": self.empty,
            "splits": self.splits,
        }
        write_json(self.folder / JOURNAL, {**content, "checksum": checksum(content)})


def _first_difference(before: list[Any], now: list[Any]) -> tuple[Any, Any]:
    for old, new in zip(before, now, strict=False):
        if old != new:
            return old, new
    return f"{len(before)} files", f"{len(now)} files"


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _refuse_foreign(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    others = sorted(name for name in names if name != LOCK and PARTIAL not in name)
    if others and names.isdisjoint({MANIFEST, JOURNAL}):
        raise ValueError(f"{folder} is not empty ({', '.join(others[:5])}): choose a new directory")


@contextmanager
def opened(folder: Path, settings: dict[str, Any]) -> Iterator[Journal]:
    """The journal of `folder`, created if need be, for this process alone.

    Raises ValueError if another process prepares there, or it holds something else.
    """
    from filelock import FileLock, Timeout

    make_folder(folder)
    _refuse_foreign(folder)  # before the lock is a file in it
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{folder}: another `lattice prepare` is writing there") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        journal = Journal(folder, settings)
        yield journal
        if (folder / MANIFEST).exists():
            (folder / LOCK).unlink(missing_ok=True)
    finally:
        lock.release()


def unfinished_command(folder: Path) -> str | None:
    """The command that finishes the preparation of `folder`; None if there is nothing unfinished."""
    if not (folder / JOURNAL).is_file() or (folder / MANIFEST).is_file():
        return None
    try:
        return command(_load(folder / JOURNAL)["settings"], folder)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / JOURNAL} is damaged: delete '{folder}' and prepare again") from error
