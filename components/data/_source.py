"""From a stream of tokens to training batches and validation windows.

The training stream is cut into sequences of L inputs and the token after them: sequence i covers tokens
[i·L, i·L + L]. A counter g numbers the sequences of the whole run; epoch g // n visits all n sequences in an
order keyed by (seed, epoch). Step s takes g in [s·batch, (s+1)·batch), rank r the r-th of world_size equal
parts. So the step number alone says where a run stands, whatever the number of workers and ranks.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import count, islice
from multiprocessing import parent_process
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lattice.components.data._shards import TokenStream
from lattice.components.data._shuffle import Shuffle
from lattice.protocols import Batch, DataRequest, Source

IGNORED = -100
PREFETCH = 4
"""Micro-batches each worker process reads ahead."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Window:
    """A range [start, stop) of a stream."""

    def __init__(self, stream: TokenStream, start: int, stop: int) -> None:
        self.stream, self.start, self.tokens = stream, start, stop - start

    def fingerprint(self) -> str:
        """Of the content, not of where it lies."""
        digests = [shard.digest for shard in self.stream.shards]
        content = repr((self.start, self.tokens, self.stream.vocab_size, digests))
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class Sequences(Dataset[Batch]):
    """Micro-batches of training sequences, addressed by their counters g."""

    def __init__(self, window: Window, request: DataRequest) -> None:
        self._window = window
        self._length = request.sequence_tokens
        self._documents = request.documents
        self._seed = request.seed
        self.count = max(0, window.tokens - 1) // request.sequence_tokens

    def __getitem__(self, counters: range) -> Batch:
        places = [(g // self.count, self._sequence(g)) for g in counters]
        starts = [self._window.start + sequence * self._length for _, sequence in places]
        stream = self._window.stream
        tokens = torch.from_numpy(np.stack([stream.read(s, s + self._length + 1) for s in starts]))
        documents = None
        if self._documents:
            rows = [stream.documents(s, s + self._length) for s in starts]
            documents = torch.from_numpy(np.stack(rows))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, _identity(places))

    def _sequence(self, counter: int) -> int:
        epoch, place = divmod(counter, self.count)
        return _shuffle(self.count, self._seed, epoch)(place)


@lru_cache(maxsize=4)
def _shuffle(n: int, seed: int, epoch: int) -> Shuffle:
    return Shuffle(n, seed, epoch)


def _obey_the_trainer(worker: int) -> None:
    """Lets this worker end only when its trainer ends it. torchrun, a scheduler and a terminal signal all
    processes of a run, and the trainer needs its workers until it has saved."""
    trainer = parent_process()
    assert trainer is not None

    def obey() -> None:
        while signal.sigwaitinfo(STOPS).si_pid != trainer.pid:
            pass
        os._exit(0)

    # Blocked here, and so in all threads that start from here; torch notices itself when the trainer is gone.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=obey, daemon=True).start()


def _identity(places: list[tuple[int, int]]) -> str:
    epochs = sorted({epoch for epoch, _ in places})
    parts = []
    for epoch in epochs:
        numbers = " ".join(str(sequence) for e, sequence in places if e == epoch)
        parts.append(f"epoch {epoch}, sequences {numbers}")
    return "; ".join(parts)


class PackedSource(Source):
    """Training batches of `train`, validation windows of `validation`.

    Raises ValueError if the batch cannot be divided, or the data has fewer sequences than one batch.
    """

    def __init__(
        self, train: Window, validation: Window, request: DataRequest, workers: int, bytes_per_token: float
    ) -> None:
        share = request.world_size * request.micro_batch
        if request.batch < 1 or request.batch % share:
            raise ValueError(
                f"batch = {request.batch} sequences: must be a multiple of world_size * micro_batch = "
                f"{request.world_size} * {request.micro_batch} = {share}"
            )
        self._request = request
        self._validation = validation
        self._workers = workers
        self._sequences = Sequences(train, request)
        self.fingerprints = {
            "training": train.fingerprint(),
            "validation": validation.fingerprint(),
            "tokenizer": request.codec.fingerprint,
        }
        self.validation_bytes_per_token = bytes_per_token
        if self._sequences.count < request.batch:
            raise ValueError(
                f"{train.stream.name} has {train.tokens} tokens to train on, {self._sequences.count} "
                f"sequences of {request.sequence_tokens}: fewer than one batch of {request.batch}; prepare "
                "more text, or make the batch or the sequences smaller"
            )

    def steps(self, first: int) -> Iterator[list[Batch]]:
        from torchdata.stateful_dataloader import StatefulDataLoader

        if first < 0:
            raise ValueError(f"first = {first}: must be at least 0")
        # The loader's own state_dict refuses another number of workers, so it is not what a checkpoint
        # holds: a loader that starts at the step is the same position. Its generator is its own, since it
        # would else draw from the global one.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="'set_vital' is deprecated"
            )  # of the library's own call
            loader = StatefulDataLoader(
                self._sequences,
                sampler=_MicroBatches(self._request, first),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=PREFETCH if self._workers else None,
                worker_init_fn=_obey_the_trainer if self._workers else None,
                generator=torch.Generator(),
                snapshot_every_n_steps=1 << 30,
            )
        batches = iter(loader)
        accumulate = self._request.batch // (self._request.world_size * self._request.micro_batch)
        try:
            while step := list(islice(batches, accumulate)):
                yield step
        except (EOFError, ConnectionError) as error:  # killed while it sent a batch; else torch says the same
            raise RuntimeError("DataLoader worker ended unexpectedly") from error

    def validation(self, max_tokens: int) -> Iterator[Batch]:
        """All ranks get the same number of batches of the same shape, which sharded models need: a rank
        without text of its own gets windows in which no target counts."""
        request, length = self._request, self._request.sequence_tokens
        targets = max(0, min(self._validation.tokens - 1, max_tokens))
        windows = -(-targets // length)
        block = request.world_size * request.micro_batch
        for base in range(0, windows, block):
            mine = range(base + request.rank * request.micro_batch, base + block)[: request.micro_batch]
            yield self._validation_batch(mine, windows, targets)

    def validation_documents(self, most: int | None = None) -> Iterator[list[int]]:
        """Documents that lie within the held-out window as a whole."""
        window, eos = self._validation, self._request.codec.eos_id
        spans = window.stream.spans(window.start, window.start + window.tokens)
        for start, stop in islice(spans, most):
            ids = window.stream.read(start, stop).tolist()
            yield ids[:-1] if ids[-1] == eos else ids

    def position(self, step: int) -> dict[str, Any]:
        """The step's first sequence. All but "step", "epoch" and "sequence" is constant over a run."""
        counter, request = step * self._request.batch, self._request
        return {
            "step": step,
            "epoch": counter // self._sequences.count,
            "sequence": counter % self._sequences.count,
            "sequences": self._sequences.count,
            "sequence_tokens": request.sequence_tokens,
            "batch": request.batch,
            "seed": request.seed,
            "data": self.fingerprints["training"],
            "tokenizer": self.fingerprints["tokenizer"],
        }

    def _validation_batch(self, windows: range, among: int, targets: int) -> Batch:
        """`windows` of the `among` that are read in all, `targets` targets, spread over the held-out text:
        its start alone would be a few documents."""
        available = -(-(self._validation.tokens - 1) // self._request.sequence_tokens)
        length, stream = self._request.sequence_tokens, self._validation.stream
        shape = (len(windows), length)
        ids = np.full(shape, self._request.codec.eos_id, dtype=np.int64)
        wanted = np.full(shape, IGNORED, dtype=np.int64)
        documents = np.full(shape, -1, dtype=np.int64)  # padding is a document of its own
        for row, window in enumerate(windows):
            size = min(length, targets - window * length)
            if size <= 0:
                continue
            start = self._validation.start + window * available // among * length
            tokens = stream.read(start, start + size + 1)
            ids[row, :size], wanted[row, :size] = tokens[:-1], tokens[1:]
            if self._request.documents:
                documents[row, :size] = stream.documents(start, start + size)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(wanted),
            torch.from_numpy(documents) if self._request.documents else None,
            f"validation, windows {' '.join(map(str, windows))}",
        )


class _MicroBatches:
    """The counters of each micro-batch of this rank from a step on, without end."""

    def __init__(self, request: DataRequest, first: int) -> None:
        self._request, self._first = request, first

    def __iter__(self) -> Iterator[range]:
        request = self._request
        share = request.batch // request.world_size
        for step in count(self._first):
            begin = step * request.batch + request.rank * share
            for start in range(begin, begin + share, request.micro_batch):
                yield range(start, start + request.micro_batch)
