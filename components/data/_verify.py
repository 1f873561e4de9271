"""Checks shards against the checksums of their manifest, once for each file on a machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lattice.atomic import CannotWrite, write_json
from lattice.components.data._shards import Shard, TokenStream
from lattice.console import warn

VERIFIED = "verified.json"
CHUNK = 1 << 23
THREADS = 8


def verify(streams: Sequence[TokenStream], cache: Path) -> None:
    """Reads every shard once and checks its checksum, its ids and its index.

    What passed is noted in `cache`, so that later runs skip the file as long as its size and time of change
    stay. Raises ValueError that names the file.
    """
    path = cache / VERIFIED
    known = _load(path)
    todo = [
        (shard, stream.vocab_size)
        for stream in streams
        for shard in stream.shards
        if not _keys(shard) <= known
    ]
    if not todo:
        return
    # Hashing releases the interpreter lock.
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for keys in pool.map(lambda item: _check(*item), todo):
            known |= keys
    # Another process may have added its own in the meantime; what is lost is only verified again.
    try:
        write_json(path, sorted(known | _load(path)))
    except CannotWrite as error:
        warn(f"{error}: the data is verified by every run; set XDG_CACHE_HOME, or data.verify = false")


def _check(shard: Shard, vocab_size: int) -> set[str]:
    keys = _keys(shard)  # before reading, so that a change while reading is not noted as verified
    tokens = np.dtype(shard.dtype).newbyteorder("<")
    digest = hashlib.sha256()
    with shard.tokens_path.open("rb") as file:
        position = 0
        while content := file.read(CHUNK):
            digest.update(content)
            ids = np.frombuffer(content, dtype=tokens)
            if ids.max() >= vocab_size:
                raise ValueError(
                    f"{shard.tokens_path} holds id {ids.max()} at token {position + int(ids.argmax())}, but "
                    f"the vocabulary has {vocab_size} tokens: restore it, or prepare the data again"
                )
            position += len(ids)
    _compare(shard.tokens_path, digest.hexdigest(), shard.digest)
    index = shard.index_path.read_bytes()
    _compare(shard.index_path, hashlib.sha256(index).hexdigest(), shard.index_digest)
    _check_index(shard, np.frombuffer(index, dtype="<u8"))
    return keys


def _compare(path: Path, actual: str, expected: str) -> None:
    if actual != expected:
        raise ValueError(
            f"{path} is damaged: its sha256 is {actual}, must be {expected}; restore it, "
            "or prepare the data again"
        )


def _check_index(shard: Shard, starts: npt.NDArray[np.uint64]) -> None:
    if len(starts) and (starts[0] != 0 or (starts[1:] <= starts[:-1]).any() or starts[-1] >= shard.tokens):
        raise ValueError(
            f"{shard.index_path}: document starts must rise from 0 to below {shard.tokens}; "
            "prepare the data again"
        )


def _keys(shard: Shard) -> set[str]:
    """What identifies the content of the shard's files without reading them."""
    keys = set()
    for path, digest in ((shard.tokens_path, shard.digest), (shard.index_path, shard.index_digest)):
        status = path.stat()
        keys.add(f"{digest} {status.st_size} {status.st_mtime_ns}")
    return keys


def _load(path: Path) -> set[str]:
    """Empty if there is no usable note: the shards are then verified again."""
    try:
        return {key for key in json.loads(path.read_bytes()) if isinstance(key, str)}
    except (OSError, ValueError, TypeError, RecursionError):
        return set()
