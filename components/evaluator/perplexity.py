"""Loss on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lattice.protocols import Batch, EvaluationSubject, Evaluator
from lattice.registry import register


@register("evaluator", "perplexity")
@dataclass(frozen=True, kw_only=True)
class Perplexity(Evaluator):
    """Held-out loss (nats a token), perplexity and bits per byte, at the evaluation number of iterations.

    Bits per byte divide by the mean bytes a token of the whole held-out text, so that tokenizers compare.
    """

    gives_loss = True

    every: int = 100
    """Steps between evaluations; 0 for the end only."""
    max_tokens: int = 100_000
    """Held-out tokens to read, spread over the held-out text."""
    sequential: bool = False
    """Feed the text token by token, the thoughts computed in sequence as in decoding, rather than by the
    parallel solver that is used in training."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every = {self.every}: must be at least 0")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: must be at least 1")

    @torch.no_grad()
    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        total, count = 0.0, 0.0
        for batch in subject.source.validation(self.max_tokens):
            batch = batch.to(subject.device)
            with subject.autocast():
                total += self._loss_sum(subject, batch)
            count += int((batch.targets_BL != -100).sum())
        total, count = subject.world.sum([total, count])
        if count == 0:
            raise ValueError("the data holds no validation text: prepare it with --validation-fraction")
        loss = total / count
        bits_per_byte = loss / math.log(2) / subject.source.validation_bytes_per_token
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte}

    def _loss_sum(self, subject: EvaluationSubject, batch: Batch) -> float:
        ids_BL, targets_BL, documents_BL = batch.ids_BL, batch.targets_BL, batch.documents_BL
        if not self.sequential:
            return float(subject.model(ids_BL, documents=documents_BL, targets=targets_BL).loss_sum)
        cache, losses = subject.model.cache(), []
        for at in range(ids_BL.shape[1]):
            here = slice(at, at + 1)
            document_B1 = None if documents_BL is None else documents_BL[:, here]
            logits_BV = subject.model.step(ids_BL[:, here], cache, documents_B1=document_B1)
            losses.append(F.cross_entropy(logits_BV.float(), targets_BL[:, at], reduction="sum"))
        return float(torch.stack(losses).sum())
