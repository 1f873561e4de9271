"""Loss on held-out documents, each read alone from its beginning.

Unlike the windows of `perplexity`, no token is predicted from another document's text, and with `overlap`
every token but the first ones has at least so much context ("sliding window", arXiv 2012.15832).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence

from lattice.padding import padded
from lattice.protocols import EvaluationSubject, Evaluator
from lattice.registry import register

IGNORED = -100


@register("evaluator", "documents")
@dataclass(frozen=True, kw_only=True)
class Documents(Evaluator):
    """Held-out loss (nats a token), perplexity and bits per byte, document by document."""

    gives_loss = True

    every: int = 0
    """Steps between evaluations; 0 for the end only."""
    max_documents: int | None = None
    """Read no more than the first so many; all if not given."""
    overlap: int = 0
    """Tokens of a window that the one before it has scored already: context alone. 0 reads each once."""
    batch: int = 16
    """Windows that are scored at once."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("overlap", 0), ("batch", 1), ("max_documents", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")

    def check(self, subject: EvaluationSubject) -> None:
        context = subject.model.shape.context
        if self.overlap >= context:
            raise ValueError(f"overlap = {self.overlap}: must be less than the model's context of {context}")
        if not any(subject.source.validation_documents(self.max_documents)):
            raise ValueError(
                "no whole document lies in the held-out text: prepare the data with --validation-fraction"
            )

    @torch.no_grad()
    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        self.check(subject)
        context = subject.model.shape.context
        loss, tokens, size, documents = 0.0, 0, 0, 0
        windows: list[tuple[list[int], list[int]]] = []
        mine = subject.world.data_rank, subject.world.data_size
        for ids in islice(subject.source.validation_documents(self.max_documents), mine[0], None, mine[1]):
            documents += 1
            size += len(subject.codec.decode(ids).encode())
            for window in self._windows([subject.codec.eos_id, *ids], context):
                windows.append(window)
                tokens += sum(target != IGNORED for target in window[1])
            if len(windows) >= 8 * self.batch:
                loss += self._loss(subject, windows)
                windows = []
        loss += self._loss(subject, windows)
        loss, *counts = subject.world.sum([loss, tokens, size, documents])
        tokens, size, documents = map(int, counts)
        mean = loss / tokens
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": loss / math.log(2) / size,
            "documents": documents,
            "tokens": tokens,
        }

    def _windows(self, ids: list[int], context: int) -> Iterator[tuple[list[int], list[int]]]:
        """Inputs and targets: of a document that begins with the end of the one before it, each token but
        that one is a target once."""
        first = 0
        while first < len(ids) - 1:
            start = max(0, first - self.overlap)
            stop = min(start + context, len(ids) - 1)
            yield ids[start:stop], [IGNORED] * (first - start) + ids[first + 1 : stop + 1]
            first = stop

    def _loss(self, subject: EvaluationSubject, windows: list[tuple[list[int], list[int]]]) -> float:
        """Summed loss; windows of like length share a batch."""
        total, order = 0.0, sorted(windows, key=lambda window: len(window[0]), reverse=True)
        for at in range(0, len(order), self.batch):
            rows = order[at : at + self.batch]
            ids_BL, mask_BL = padded([ids for ids, _ in rows], subject.device)
            targets_BL = pad_sequence(
                [torch.tensor(targets) for _, targets in rows], batch_first=True, padding_value=IGNORED
            )
            with subject.autocast():
                output = subject.model(ids_BL, mask_BL, targets=targets_BL.to(subject.device))
            assert output.loss_sum is not None
            total += float(output.loss_sum)
        return total
