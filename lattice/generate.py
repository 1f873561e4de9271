"""Decoding with a key/value cache: prompt, then one token after the other, each after its thoughts.

Shapes: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lattice.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens are candidates."""
    top_p: float | None = None
    """Only the smallest set of tokens with this much probability are candidates."""
    seed: int | Sequence[int] | None = None
    """Of the draws: row r of a batch draws with seed + r, as it does alone with that seed; or a seed for each
    row. New ones each time if not given."""
    vocab_size: int | None = None
    """Tokens of the tokenizer: the rows by which a model's table is larger are never chosen."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be in (0, 1]")

    def generators(self, rows: int, device: torch.device) -> list[torch.Generator]:
        """One for each row; none where nothing is drawn."""
        if self.temperature == 0:
            return []
        made = [torch.Generator(device=device) for _ in range(rows)]
        seeds = self.seed
        if isinstance(seeds, int):
            seeds = [seeds + row for row in range(rows)]
        elif seeds is not None and len(seeds) != rows:
            raise ValueError(f"seed = {list(seeds)}: must be one for each of the {rows} rows")
        for seed in seeds or ():
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed = {seed}: must be at least 0 and less than 2**64")
        for row, generator in enumerate(made):
            generator.seed() if seeds is None else generator.manual_seed(seeds[row])
        return made

    def choose(self, logits_BV: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The next token of each row, (B, 1)."""
        logits_BV = logits_BV[:, : self.vocab_size]
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1, keepdim=True)
        logits_BV = logits_BV.float()
        logits_BV = (
            logits_BV - logits_BV.amax(dim=-1, keepdim=True)
        ) / self.temperature  # however small it is
        if self.top_k is not None:
            least_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[-1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if self.top_p is not None and self.top_p < 1:  # all tokens need not add up to 1 as they are rounded
            sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
            probability_BV = sorted_BV.softmax(dim=-1)
            # A token stays if those before it do not make up top_p; the likeliest always stays.
            outside_BV = probability_BV.cumsum(dim=-1) - probability_BV >= self.top_p
            logits_BV = logits_BV.masked_fill(outside_BV.gather(-1, order_BV.argsort(-1)), -torch.inf)
        probability_BV = logits_BV.softmax(dim=-1)
        drawn = [
            torch.multinomial(probability_V, 1, generator=generator)
            for probability_V, generator in zip(probability_BV, generators, strict=True)
        ]
        return torch.stack(drawn)


def stream(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    attention_mask: Tensor | None = None,
    parallel_prefill: bool = False,
) -> Iterator[Tensor]:
    """The next token of each row, (B, 1), one after the other.

    `attention_mask` (B, L) marks left padding with 0. Thoughts are computed in sequence, those of the
    prompt too unless `parallel_prefill`. Raises ValueError where prompt and new tokens do not fit the
    model's context; nothing is computed before that is known.
    """
    sampling = sampling or Sampling()
    length = input_ids.shape[1]
    if length < 1:
        raise ValueError("input_ids: the prompt is empty; must have at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 0")
    if length + max_new_tokens > model.shape.context:
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones do not fit the model's context of "
            f"{model.shape.context}: shorten the prompt or lower max_new_tokens"
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError("attention_mask: a prompt must be padded on the left, its last token must be real")
    return _stream(model, input_ids, max_new_tokens, sampling, attention_mask, parallel_prefill)


def _stream(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    attention_mask: Tensor | None,
    parallel_prefill: bool,
) -> Iterator[Tensor]:
    generators = sampling.generators(len(input_ids), input_ids.device)
    logits_BV, cache = None, None
    for _ in range(max_new_tokens):
        if logits_BV is None or cache is None:
            logits_BV, cache = model.prefill(input_ids, attention_mask, parallel=parallel_prefill)
        else:
            logits_BV = model.step(ids_B1, cache)  # noqa: F821  (bound by the turn before)
        ids_B1 = sampling.choose(logits_BV, generators)
        yield ids_B1


def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    attention_mask: Tensor | None = None,
    parallel_prefill: bool = False,
) -> Tensor:
    """Prompts (B, L) and what follows them, (B, L + at most max_new_tokens).

    `temperature = 0` is greedy. After `eos_id` a row holds nothing but `eos_id`, and when all rows have
    ended so does the loop. `vocab_size` is the tokenizer's, where the model's is padded. See
    `stream` for the rest and for the errors.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, vocab_size=vocab_size)
    out_BL, ended_B1 = [input_ids], torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
    following = stream(
        model,
        input_ids,
        max_new_tokens,
        sampling=sampling,
        attention_mask=attention_mask,
        parallel_prefill=parallel_prefill,
    )
    for ids_B1 in following:
        if eos_id is not None:
            ids_B1 = ids_B1.masked_fill(ended_B1, eos_id)
            ended_B1 = ended_B1 | (ids_B1 == eos_id)
        out_BL.append(ids_B1)
        if bool(ended_B1.all()):
            break
    return torch.cat(out_BL, dim=1)
