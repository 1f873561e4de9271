"""A continuation, to see with one's own eyes what the model has learnt."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.generate import Sampling
from lattice.protocols import EvaluationSubject, Evaluator
from lattice.registry import register
from lattice.text_generation import generate_text, prompt_ids


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
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        self._sampling()

    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def check(self, subject: EvaluationSubject) -> None:
        prompt_ids(subject.model, subject.codec, [(0, self.prompt)], self.max_new_tokens)

    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        with subject.autocast():
            [completion] = generate_text(
                subject.model,
                subject.codec,
                [self.prompt],
                max_new_tokens=self.max_new_tokens,
                sampling=self._sampling(),
            )
        return {"text": completion.prompt + completion.text}
