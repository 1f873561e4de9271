"""From sources to documents: which files there are, and their records in order.

A source is a plain text file (one document), a `.jsonl` or `.parquet` file (one document a record), a folder
of these, or the name of a Hugging Face dataset. `.gz`, `.xz` and `.zst` are decompressed on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lattice.text_sources import HubDataset, JsonLines, Parquet, PlainText, Record, TextSource
from lattice.unpack import COMPRESSIONS

TEXT = (".txt", ".text", ".md", ".markdown", ".rst")
"""Taken from folders; a file named on its own may have any other name too."""
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
DEFAULT_HUB_SPLIT = "train"


class Place(NamedTuple):
    """Before a document: so many records into a source."""

    source: int
    record: int


def find_sources(names: Sequence[str], text_key: str) -> tuple[list[TextSource], list[str]]:
    """The sources in order, folders replaced by the files in them, and the files that no reader takes.

    Raises FileNotFoundError for a path that does not exist, ValueError for one that cannot be used.
    """
    if not names:
        raise ValueError("no source given: name files, folders, or a Hugging Face dataset")
    found: list[TextSource] = []
    skipped: list[str] = []
    for name in names:
        if Path(name).is_dir():
            files, left = _walk(Path(name))
            if not files:
                raise ValueError(f"{name} holds no {', '.join((*TEXT, *JSON_LINES, *PARQUET))} file")
            found += [_file_source(file, text_key) for file in files]
            skipped += left
        elif Path(name).exists():
            found.append(_file_source(Path(name), text_key))
        else:
            found.append(_hub_source(name, text_key))
    seen: set[str] = set()
    for source in found:
        key = source.name if source.size is None else str(Path(source.name).resolve())
        if key in seen:
            raise ValueError(f"{source.name} is named twice among the sources")
        seen.add(key)
    return found, skipped


def records(sources: Sequence[TextSource], start: Place) -> Iterator[tuple[Place, Record]]:
    """Every document as it lies there, empty ones too, from `start` on, and its place.

    Raises ValueError that names the file and the place in it.
    """
    for number in range(start.source, len(sources)):
        first = start.record if number == start.source else 0
        for record, content in enumerate(sources[number].records(first), first):
            yield Place(number, record), content


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """Files below `folder` that have a reader, sorted, and all other entries, so that none goes unsaid."""
    files: list[Path] = []
    skipped: list[str] = []

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    for here, folders, names in os.walk(folder, onerror=fail):
        hidden = [f for f in folders if f.startswith(".") or (Path(here) / f).is_symlink()]
        skipped += [f"{Path(here) / f}/" for f in hidden]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in names:
            path = Path(here) / name
            known = _format(path) in (*TEXT, *JSON_LINES, *PARQUET) and not name.startswith(".")
            if known and (path.is_file() or not path.exists()):  # a link to nowhere is said when it is opened
                files.append(path)
            else:
                skipped.append(str(path))
    return sorted(files), sorted(skipped)


def _format(path: Path) -> str:
    """The suffix that tells the format: that before `.gz` and the like."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def _file_source(path: Path, text_key: str) -> TextSource:
    suffix = _format(path)
    if suffix == ".json":
        raise ValueError(
            f"{path} is a .json file: rename it to .jsonl if it holds one record a line, else convert it"
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file: it is read more than once; write it to a file first")
    try:
        size = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if suffix in JSON_LINES:
        return JsonLines(str(path), size, text_key)
    if suffix in PARQUET:
        return Parquet(str(path), size, text_key)
    return PlainText(str(path), size)


def _hub_source(name: str, text_key: str) -> TextSource:
    dataset, _, config = name.partition(":")
    looks_like_file = _format(Path(name)) in (*TEXT, *JSON_LINES, *PARQUET, ".json")
    if looks_like_file or name.startswith((".", "/", "~")) or dataset.count("/") > 1 or not dataset:
        raise FileNotFoundError(
            f"source {name!r} does not exist: name a file, a folder or a dataset on the hub"
        )
    return HubDataset(name, None, text_key, dataset, config or None, DEFAULT_HUB_SPLIT)


def texts(sources: Sequence[TextSource]) -> Iterator[str]:
    """Only the texts, to train a tokenizer on."""
    return (sources[place.source].text(record)[0] for place, record in records(sources, Place(0, 0)))
