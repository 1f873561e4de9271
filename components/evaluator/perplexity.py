"""Loss on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lattice.protocols import EvaluationSubject, Evaluator
from lattice.registry import register


@register("evaluator", "perplexity")
@dataclass(frozen=True, kw_only=True)
class Perplexity(Evaluator):
    """Held-out loss (nats a token), perplexity and bits per byte, at the evaluation number of iterations.

    Bits per byte divide by the mean bytes a token of the whole held-out text, so that tokenizers compare.
    """

    every: int = 100
    """Steps between evaluations; 0 for the end only."""
    max_tokens: int = 100_000
    """Held-out tokens to read, from the start of the held-out text."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every = {self.every}: must be at least 0")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: must be at least 1")

    @torch.no_grad()
    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        total, count = 0.0, 0
        for batch in subject.source.validation(self.max_tokens):
            batch = batch.to(subject.device)
            with subject.autocast():
                output = subject.model(batch.ids_BL, documents=batch.documents_BL, targets=batch.targets_BL)
            total += float(output.loss_sum)
            count += int(output.count)
        if count == 0:
            raise ValueError("the data holds no validation text: prepare it with --validation-fraction")
        loss = total / count
        bits_per_byte = loss / math.log(2) / subject.source.validation_bytes_per_token
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte}
