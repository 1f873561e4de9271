"""A continuation, to see with one's own eyes what the model has learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lattice.generate import Sampling, stream
from lattice.protocols import EvaluationSubject, Evaluator
from lattice.registry import register


@register("evaluator", "sample")
@dataclass(frozen=True, kw_only=True)
class Sample(Evaluator):
    """Continues a prompt, thoughts computed in sequence."""

    prompt: str
    """What the sample goes on from."""
    max_new_tokens: int = 64
    """Fewer where the text ends."""
    temperature: float = 0.8
    """Logits are divided by it; 0 for the likeliest token."""
    top_p: float = 0.95
    """Of the likeliest tokens, as many as have this probability together; 1 for all."""
    seed: int = 0
    """Of the draws."""
    every: int = 0
    """Steps between samples; 0 for the end only."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt = '': must not be empty")
        if self.every < 0:
            raise ValueError(f"every = {self.every}: must be at least 0")
        self._sampling()

    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def check(self, subject: EvaluationSubject) -> None:
        self._stream(subject)

    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        prompt, following = self._stream(subject)
        with subject.autocast():
            ids = [int(ids) for ids in following]
        return {"text": subject.codec.decode([*prompt, *ids])}

    def _stream(self, subject: EvaluationSubject) -> tuple[list[int], Iterator[Tensor]]:
        """The prompt's ids and what will follow them, not computed yet."""
        prompt = subject.codec.encode_batch([self.prompt])[0]
        sampling = replace(self._sampling(), vocab_size=subject.codec.vocab_size)
        ids_BL = torch.tensor([prompt], device=subject.device)
        return prompt, stream(subject.model, ids_BL, self.max_new_tokens, sampling=sampling)
