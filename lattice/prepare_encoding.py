"""Records to tokens: read by one thread, encoded in batches by this process or by several, returned in order.

Batches are cut in the order of the sources and come back in that order, whoever encodes them and however many
do. Few are under way at a time, so that memory does not grow with the sources.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lattice.documents import Place, records
from lattice.protocols import Codec, Tokenizer
from lattice.text_sources import Record, TextSource

T = TypeVar("T")
Ids = npt.NDArray[np.int32]
Batch = list[tuple[Place, Record]]
BATCH_BYTES = 4_000_000
BATCH_DOCUMENTS = 4096
AHEAD = 3
"""Batches that wait between two stages."""


class Document(NamedTuple):
    place: Place
    ids: Ids
    """Without the token that ends a document; none if there is no text."""
    bytes: int
    """UTF-8 bytes of the text."""
    held_out: bool


@dataclass(frozen=True)
class Encoded:
    """A batch's documents, their ids in one piece, as one process sends them to another."""

    places: list[Place]
    ids: Ids
    lengths: list[int]
    bytes: list[int]
    held_out: list[bool]

    def __iter__(self) -> Iterator[Document]:
        spans = pairwise([0, *accumulate(self.lengths)])
        for place, (start, end), size, held_out in zip(
            self.places, spans, self.bytes, self.held_out, strict=True
        ):
            yield Document(place, self.ids[start:end], size, held_out)


@dataclass(frozen=True)
class Encoder:
    """What is done to a batch, wherever."""

    sources: Sequence[TextSource]
    codec: Codec
    validation_fraction: float

    def __call__(self, batch: Batch) -> Encoded:
        read = [self.sources[place.source].text(record) for place, record in batch]
        encoded = self.codec.encode_batch([text for text, _ in read])
        lengths = [len(ids) for ids in encoded]
        return Encoded(
            places=[place for place, _ in batch],
            ids=np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=sum(lengths)),
            lengths=lengths,
            bytes=[size for _, size in read],
            held_out=[_is_held_out(text, self.validation_fraction) for text, _ in read],
        )


def _is_held_out(text: str, fraction: float) -> bool:
    """By the text alone, so that equal documents stay on one side and the order does not matter."""
    if fraction == 0:
        return False
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def encoded_documents(
    encoder: Encoder, start: Place, *, workers: int, maker: Tokenizer, folder: Path
) -> Generator[Document, None, None]:
    """Every document from `start` on, in order. With `workers` processes, each opens the tokenizer that
    `maker` saved to `folder`; with none, this process encodes, on all cores inside the tokenizer.

    Raises ValueError that names the place, after all documents before it.
    """
    if workers:
        pool: Executor = _processes(encoder, workers, maker, folder)
        call = _encode_here
    else:
        pool, call = ThreadPoolExecutor(1), encoder
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in _ahead(_failing_last(_batches(records(encoder.sources, start)))):
            waiting.append(_failed(batch) if isinstance(batch, Exception) else pool.submit(call, batch))
            if len(waiting) > max(AHEAD, 2 * workers):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process ended unexpectedly, perhaps for lack of memory. Run the same command again to "
            "continue, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(stream: Iterator[tuple[Place, Record]]) -> Iterator[Batch]:
    """Records in batches of bounded size, at least one each."""
    batch: Batch = []
    size = 0
    for place, record in stream:
        batch.append((place, record))
        size += len(record.content)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _failing_last(batches: Iterator[Batch]) -> Iterator[Batch | Exception]:
    """The error of reading as the last item: it is raised once what came before it is done."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        yield error


def _failed(error: Exception) -> Future[Encoded]:
    failed: Future[Encoded] = Future()
    failed.set_exception(error)
    return failed


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items in order, drawn by another thread up to AHEAD early."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, items, None) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


# ── worker processes ──────────────────────────────────────────────────────────────────────────────
_here: Encoder | None = None
"""In a worker process: its encoder."""


def _processes(encoder: Encoder, workers: int, maker: Tokenizer, folder: Path) -> ProcessPoolExecutor:
    # Forked from a server that has imported this module and started no thread: cheap and safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    arguments = (encoder.sources, maker, folder, encoder.validation_fraction)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_open_here, initargs=arguments)


def _open_here(sources: Sequence[TextSource], maker: Tokenizer, folder: Path, fraction: float) -> None:
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process is interrupted and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism
    _here = Encoder(sources, maker.build(folder), fraction)


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for the next batch without end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_here(batch: Batch) -> Encoded:
    assert _here is not None
    return _here(batch)
