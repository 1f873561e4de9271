"""Prepared data on disk, the writing side: shards of tokens, their index, the manifest.

A prepared directory holds

    manifest.json            what is there, and a checksum of what it says; written last
    train-00000.bin          tokens, little endian, every document followed by the end-of-document token
    train-00000.idx          where each document starts in that shard, in tokens: uint64, little endian
    validation-00000.bin …
    tokenizer/               the tokenizer that made the tokens

A document never crosses a shard. `lattice.components.data._shards` reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lattice.atomic import PARTIAL, naming
from lattice.protocols import Codec

FORMAT = "lattice-tokens"
VERSION = 2
MANIFEST = "manifest.json"
JOURNAL = "progress.json"
"""Present while a preparation is unfinished."""
INDEX_DTYPE = "<u8"
INDEX_BYTES = 8


def token_dtype(vocab_size: int) -> str:
    """The smallest of "uint16" and "uint32" that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def manifest(
    codec: Codec, tokenizer: dict[str, str], splits: dict[str, list[dict[str, Any]]], **facts: Any
) -> dict[str, Any]:
    """The manifest of finished shards; `tokenizer` says how it was asked for ("spec", "kind")."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            **tokenizer,
            "fingerprint": codec.fingerprint,
            "vocab_size": codec.vocab_size,
            "eos_id": codec.eos_id,
        },
        "dtype": token_dtype(codec.vocab_size),
        "splits": {
            name: {
                **{count: sum(s[count] for s in shards) for count in ("documents", "tokens", "bytes")},
                "shards": shards,
            }
            for name, shards in splits.items()
        },
        **facts,
    }
    return {**content, "checksum": checksum(content)}


def checksum(content: dict[str, Any]) -> str:
    """Of all that a manifest or a journal says, but for the checksum itself."""
    said = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class _HashedFile:
    """A file under a temporary name that is hashed as it is written and renamed when complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._hash = hashlib.sha256()
        with naming(path):
            self._file = self._partial.open("wb", buffering=1 << 20)

    def write(self, content: bytes) -> None:
        with naming(self.path):
            self._file.write(content)
        self._hash.update(content)

    def finish(self) -> str:
        """Makes the file durable under its final name and returns its sha256."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        # Closing flushes, which fails again where the disk is full; the file goes away all the same.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink()


class SplitWriter:
    """Writes one split's shards; `shards`, as in the manifest, are those complete from an earlier run.

    Methods raise CannotWrite with the file's name.
    """

    def __init__(self, folder: Path, split: str, codec: Codec, shards: Sequence[dict[str, Any]] = ()) -> None:
        self.shards = list(shards)
        self.tokens = 0  # in the open shard
        self._folder = folder
        self._split = split
        self._vocab_size = codec.vocab_size
        self._eos_id = codec.eos_id
        self._dtype = np.dtype(token_dtype(codec.vocab_size)).newbyteorder("<")
        self._file: _HashedFile | None = None
        self._starts = array("Q")
        self._bytes = 0

    def add(self, ids: Sequence[int] | npt.NDArray[np.int32], text_bytes: int) -> None:
        """Appends one document of `text_bytes` UTF-8 bytes and the end-of-document token."""
        tokens = np.append(np.asarray(ids, dtype=np.int64), self._eos_id)
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(
                f"the tokenizer gave ids from {tokens.min()} to {tokens.max()}, but its vocabulary has "
                f"{self._vocab_size}: ids must be 0 to {self._vocab_size - 1}"
            )
        if self._file is None:
            self._file = _HashedFile(self._folder / f"{self._split}-{len(self.shards):05}.bin")
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._starts.append(self.tokens)
        self.tokens += len(tokens)
        self._bytes += text_bytes

    def finish_shard(self) -> None:
        """Completes the open shard, if there is one, and adds it to `shards`."""
        if self._file is None:
            return
        digest = self._file.finish()
        index = _HashedFile(self._file.path.with_suffix(".idx"))
        try:
            index.write(np.asarray(self._starts, dtype=INDEX_DTYPE).tobytes())
            index_digest = index.finish()
        except BaseException:
            index.abandon()
            raise
        self.shards.append(
            {
                "file": self._file.path.name,
                "index": index.path.name,
                "documents": len(self._starts),
                "tokens": self.tokens,
                "bytes": self._bytes,
                "sha256": digest,
                "index_sha256": index_digest,
            }
        )
        self._file, self._starts, self.tokens, self._bytes = None, array("Q"), 0, 0

    def abandon(self) -> None:
        """Deletes the shard that is not complete."""
        if self._file is not None:
            self._file.abandon()
            self._file = None
