"""Texts continued: prompts of any lengths in batches, stop strings, text as it becomes certain.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lattice.generate import Sampling, stream
from lattice.model import LanguageModel
from lattice.protocols import Codec


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One prompt and what follows it."""

    prompt: str
    text: str
    """The continuation, without the stop string."""
    finish: Literal["stop", "end", "length"]
    """A stop string, the end of the document, or all tokens that were asked for."""
    tokens: int
    """New tokens decoded, those of the stop string among them."""


class Continuation:
    """The continuation of one prompt, token by token."""

    def __init__(self, codec: Codec, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._codec, self._stop = codec, stop
        self._ids = list(prompt_ids)
        self._prompt = codec.decode(self._ids)
        self._text = ""
        self._certain = ""
        self.tokens = 0
        self.finish: Literal["stop", "end"] | None = None

    @property
    def text(self) -> str:
        """The continuation so far, cut before the first stop string."""
        return self._text

    def add(self, token: int) -> str:
        """Takes the next token; returns text that has become certain: no part of a character or of a stop
        string that may yet be completed."""
        self.tokens += 1
        if token == self._codec.eos_id:
            self.finish = "end"
            return self._release(len(self._text))
        self._ids.append(token)
        self._text = self._decoded()
        found = [at for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if found:
            self.finish, self._text = "stop", self._text[: min(found)]
            return self._release(len(self._text))
        return self._release(len(self._text) - self._uncertain())

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        return self._release(len(self._text))

    def _uncertain(self) -> int:
        """Characters at the end that the next token may change, or that may begin a stop string."""
        whole = self._text.rstrip("\ufffd")
        sizes = [size for stop in self._stop for size in range(1, len(stop)) if whole.endswith(stop[:size])]
        return len(self._text) - len(whole) + max(sizes, default=0)

    def _decoded(self) -> str:
        whole = self._codec.decode(self._ids)
        if whole.endswith("\ufffd") and not whole.startswith(self._prompt + self._certain):
            # Byte fallback: until a character is whole, no byte of those before it decodes either.
            return self._certain + "\ufffd"
        return whole[len(self._prompt) :]

    def _release(self, end: int) -> str:
        start = len(self._certain)
        self._certain = self._text[: max(start, end)]
        return self._certain[start:]


def generate_text(
    model: LanguageModel,
    codec: Codec,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    parallel_prefill: bool = False,
) -> list[Completion]:
    """Continues each prompt up to `max_new_tokens`, the end of the document, or a stop string.

    Rows of a batch are padded on the left, and each gets what it gets alone: prompt number i, from 0, draws
    with seed `sampling.seed` + i. An empty prompt begins a document. Raises ValueError for a prompt that does
    not fit the model's context, before anything is computed, and for an empty stop string.
    """
    done = completions(
        model,
        codec,
        list(enumerate(prompts)),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        batch_size=batch_size,
        parallel_prefill=parallel_prefill,
    )
    return [completion for _, completion in sorted(done, key=lambda pair: pair[0])]


def completions(
    model: LanguageModel,
    codec: Codec,
    prompts: Sequence[tuple[int, str]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    stop: Sequence[str],
    batch_size: int,
    parallel_prefill: bool,
) -> Iterator[tuple[int, Completion]]:
    """As `generate_text`, of (number, prompt) pairs, each when its batch is done, short prompts first."""
    ids, texts = prompt_ids(model, codec, prompts, max_new_tokens), dict(prompts)
    for number, row in complete(
        model,
        codec,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        batch_size=batch_size,
        parallel_prefill=parallel_prefill,
    ):
        finish = row.finish or "length"
        yield number, Completion(prompt=texts[number], text=row.text, finish=finish, tokens=row.tokens)


def complete(
    model: LanguageModel,
    codec: Codec,
    ids: Mapping[int, list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    stop: Sequence[str],
    batch_size: int,
    parallel_prefill: bool,
) -> Iterator[tuple[int, Continuation]]:
    """As `completions`, of token ids by number."""
    check_stop(stop)
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: must be at least 1")
    sampling = replace(sampling or Sampling(), vocab_size=codec.vocab_size)
    order = sorted(ids, key=lambda number: len(ids[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = [Continuation(codec, ids[number], stop) for number in numbers]
        for ids_B1 in _stream(
            model, [ids[n] for n in numbers], numbers, max_new_tokens, sampling, parallel_prefill
        ):
            for row, token in zip(rows, ids_B1.flatten().tolist(), strict=True):
                if row.finish is None:
                    row.add(token)
            if all(row.finish for row in rows):
                break
        yield from zip(numbers, rows, strict=True)


def _stream(
    model: LanguageModel,
    rows: list[list[int]],
    numbers: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    parallel_prefill: bool,
) -> Iterator[torch.Tensor]:
    """Padded on the left, and with no mask where nothing is padded."""
    longest, device = max(map(len, rows)), next(model.parameters()).device
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    seed = sampling.seed
    if isinstance(seed, int):
        seed = [seed + number for number in numbers]
    elif seed is not None:
        seed = [seed[number] for number in numbers]
    return stream(
        model,
        padded,
        max_new_tokens,
        sampling=replace(sampling, seed=seed),
        attention_mask=None if bool(real.all()) else real,
        parallel_prefill=parallel_prefill,
    )


def check_stop(stop: Sequence[str]) -> None:
    if not all(stop):
        raise ValueError("stop = '': a stop string must not be empty")


def prompt_ids(
    model: LanguageModel, codec: Codec, prompts: Sequence[tuple[int, str]], max_new_tokens: int
) -> dict[int, list[int]]:
    """Token ids by number; an empty prompt is the end of the document before it. Raises ValueError for one
    that does not fit the context with its continuation."""
    encoded = codec.encode_batch([prompt for _, prompt in prompts])
    ids = {number: row or [codec.eos_id] for (number, _), row in zip(prompts, encoded, strict=True)}
    context = model.shape.context
    for number, row in ids.items():
        if len(row) + max_new_tokens > context:
            which = f"prompt {number + 1}: " if len(ids) > 1 else ""
            raise ValueError(
                f"{which}a prompt of {len(row)} tokens and {max_new_tokens} new ones do not fit the model's "
                f"context of {context}: shorten the prompt or lower max_new_tokens"
            )
    return ids
