"""A continuation, to see with one's own eyes what the model has learnt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lattice.generate import Sampling, stream
from lattice.protocols import EvaluationSubject, Evaluator
from lattice.registry import register


@register("evaluator", "sample")
@dataclass(frozen=True, kw_only=True)
class Sample(Evaluator):
    """Continues a prompt, thoughts computed in sequence."""

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    """Of the likeliest tokens, as many as have this probability together; 1 for all."""
    seed: int = 0
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

    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        prompt = subject.codec.encode_batch([self.prompt])[0]
        sampling = replace(self._sampling(), vocab_size=subject.codec.vocab_size)
        ids_BL = torch.tensor([prompt], device=subject.device)
        with subject.autocast():
            following = list(stream(subject.model, ids_BL, self.max_new_tokens, sampling=sampling))
        return {"text": subject.codec.decode([*prompt, *(int(ids) for ids in following)])}
