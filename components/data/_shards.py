"""Prepared data on disk, the reading side: one split as a single stream of tokens.

The format is described in lattice.shard_writer. Shards are memory-mapped, so that a stream costs no memory.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from lattice.shard_writer import FORMAT, INDEX_BYTES, INDEX_DTYPE, JOURNAL, MANIFEST, VERSION, checksum

Tokens = npt.NDArray[np.int64]


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
"""Of a file in the directory itself."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Shard(BaseModel, strict=True):
    file: FileName
    index: FileName
    documents: PositiveInt
    tokens: PositiveInt
    sha256: Digest
    index_sha256: Digest


class _Split(BaseModel, strict=True):
    shards: list[_Shard]
    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt


class _Tokenizer(BaseModel, strict=True):
    fingerprint: str
    vocab_size: PositiveInt


class _Manifest(BaseModel, strict=True):
    """What is read of a manifest."""

    splits: dict[str, _Split]
    dtype: Literal["uint16", "uint32"]
    tokenizer: _Tokenizer


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises FileNotFoundError if there is none, ValueError if it is not this format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = " (its preparation is unfinished)" if (folder / JOURNAL).exists() else ""
        raise FileNotFoundError(f"no prepared data at '{folder}'{unfinished}: {path} does not exist")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of prepared data: 'format' must be '{FORMAT}'")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {content.get('version')!r} cannot be read; must be {VERSION}: "
            "prepare the data again"
        )
    if content.get("checksum") != checksum(content):
        raise ValueError(f"{path} is damaged: its checksum differs; restore it, or prepare the data again")
    try:
        _Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged: {place}: {first['msg']}") from error
    return content


@dataclass(frozen=True)
class Shard:
    """One shard's files; raises ValueError where their size is not what the manifest says."""

    tokens_path: Path
    index_path: Path
    tokens: int
    documents: int
    dtype: str
    digest: str
    index_digest: str

    def check_sizes(self) -> None:
        token_bytes = np.dtype(self.dtype).itemsize
        for path, expected in (
            (self.tokens_path, self.tokens * token_bytes),
            (self.index_path, self.documents * INDEX_BYTES),
        ):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: restore it, or prepare the data again")
            actual = path.stat().st_size
            if actual != expected:
                raise ValueError(
                    f"{path} has {actual} bytes, must have {expected}: it is truncated or was changed; "
                    "restore it, or prepare the data again"
                )

    @cached_property
    def data(self) -> np.memmap[Any, Any]:
        return np.memmap(self.tokens_path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")

    @cached_property
    def starts(self) -> np.memmap[Any, Any]:
        return np.memmap(self.index_path, dtype=np.dtype(INDEX_DTYPE), mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy of the file: a worker opens its own.
        return {key: value for key, value in self.__dict__.items() if key not in ("data", "starts")}


class TokenStream:
    """Tokens and documents of one split; positions are tokens from 0.

    Picklable, so that worker processes can read it.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        """Raises ValueError or FileNotFoundError for missing or truncated shards."""
        facts = manifest["splits"].get(split, {"shards": [], "tokens": 0, "bytes": 0})
        self.name = f"{folder} ({split})"
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.shards = [
            Shard(
                folder / shard["file"],
                folder / shard["index"],
                shard["tokens"],
                shard["documents"],
                manifest["dtype"],
                shard["sha256"],
                shard["index_sha256"],
            )
            for shard in facts["shards"]
        ]
        for shard in self.shards:
            shard.check_sizes()
        self._first = [0, *accumulate(shard.tokens for shard in self.shards)]
        self._first_document = [0, *accumulate(shard.documents for shard in self.shards)]
        self.tokens = self._first[-1]
        self.bytes_per_token = facts["bytes"] / facts["tokens"] if facts["tokens"] else 0.0
        """UTF-8 bytes of text for each token, end-of-document tokens counted."""

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens start..stop-1. Raises ValueError for an id that is not in the vocabulary."""
        parts = [shard.data[a:b] for _, shard, a, b in self._parts(start, stop)]
        tokens = np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, dtype=np.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            place = start + int(np.argmax(tokens >= self.vocab_size))
            raise ValueError(
                f"{self.name}: token {place} has id {tokens.max()}, but the vocabulary has {self.vocab_size} "
                f"tokens: restore {self.shards[self._shard_at(place)].tokens_path}, or prepare the data again"
            )
        return tokens

    def documents(self, start: int, stop: int) -> Tokens:
        """For each of the tokens start..stop-1, the number in the stream of the document it belongs to."""
        parts = []
        for number, shard, a, b in self._parts(start, stop):
            # uint64 bounds: with plain integers older numpy converts the whole index to floats.
            low, high = np.searchsorted(shard.starts, np.array([a, b - 1], dtype=np.uint64), side="right")
            begins = np.asarray(shard.starts[low:high]).astype(np.int64)
            within = np.searchsorted(begins, np.arange(a, b), side="right")
            parts.append(self._first_document[number] + int(low) - 1 + within)
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, dtype=np.int64)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """First token and the place after the last, end-of-document token included, of each document that
        lies within start..stop-1 as a whole."""
        for number, shard in enumerate(self.shards):
            first, end = self._first[number], self._first[number + 1]
            if end <= start or first >= stop:
                continue
            begins = [first + int(at) for at in shard.starts] + [end]
            for begin, after in pairwise(begins):
                if start <= begin < after <= stop:
                    yield begin, after

    def _shard_at(self, position: int) -> int:
        return bisect.bisect_right(self._first, position) - 1

    def _parts(self, start: int, stop: int) -> list[tuple[int, Shard, int, int]]:
        """Shard number, shard and the range in it, for each shard that start..stop-1 touches."""
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"{self.name}: tokens {start} to {stop} asked for, there are {self.tokens}")
        parts = []
        number = self._shard_at(start)
        while start < stop:
            first, end = self._first[number], min(stop, self._first[number + 1])
            parts.append((number, self.shards[number], start - first, end - first))
            start, number = end, number + 1
        return parts
