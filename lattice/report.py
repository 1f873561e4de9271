"""What the commands print when they are done."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lattice.console import say, table
from lattice.generate import Sampling, stream
from lattice.model import LanguageModel
from lattice.protocols import Codec
from lattice.recipe import Recipe
from lattice.toml_source import Path_


def show_summary(summary: dict[str, Any], folder: Path) -> None:
    """The end of a run: figures, texts, where it lies and what to try next."""
    rows = [
        [name.replace("_", " "), _number(value)]
        for name, value in summary.items()
        if not isinstance(value, str)
    ]
    table(f"{folder}", ["", "value"], rows)
    for name, text in summary.items():
        if isinstance(text, str):
            say(f"\n{name.replace('_', ' ')}:\n{text}")
    say(
        f"\nThe run is in '{folder}': metrics.jsonl, tensorboard/, checkpoints/, summary.json. Next:\n"
        f'  lattice generate {folder} --prompt "def "\n'
        f"  tensorboard --logdir {folder}/tensorboard\n"
        "  lattice components recurrence"
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def show_recipe(recipe: Recipe, *, origin: bool) -> None:
    """The resolved recipe as TOML, with `origin` the source of each value behind it."""
    if not origin:
        say(recipe.to_toml())
        return
    lines = [(f"{'.'.join(path)} = {value}", path) for path, value in _leaves(recipe.table())]
    width = max(len(line) for line, _ in lines)
    for line, path in lines:
        say(f"{line:<{width}}  # {recipe.origin(path)}")


def _leaves(table_: dict[str, Any], above: Path_ = ()) -> list[tuple[Path_, str]]:
    found: list[tuple[Path_, str]] = []
    for key, value in table_.items():
        path = (*above, key)
        found += _leaves(value, path) if isinstance(value, dict) else [(path, json.dumps(value))]
    return found


def stream_text(
    model: LanguageModel, codec: Codec, prompt: str, max_new_tokens: int, sampling: Sampling
) -> None:
    """Writes the prompt and its continuation to stdout as it is decoded, up to the end of the document."""
    ids = codec.encode_batch([prompt])[0]
    device = next(model.parameters()).device
    sampling = replace(sampling, vocab_size=codec.vocab_size)
    following = stream(model, torch.tensor([ids], device=device), max_new_tokens, sampling=sampling)
    shown = codec.decode(ids)
    sys.stdout.write(shown)
    for next_id in following:
        if int(next_id) == codec.eos_id:
            break
        ids.append(int(next_id))
        text = codec.decode(ids)
        if text.endswith("\ufffd"):
            continue  # half a character: the rest comes with the next token
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
    sys.stdout.write("\n")
