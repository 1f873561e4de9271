"""What the checks look at: a recurrence over a tiny backbone whose weights are far from their initial values.

Shapes: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lattice.build import build_model
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.protocols import Recurrence
from lattice.recipe import load_recipe

VOCABULARY, CONTEXT, LAYERS = 32, 64, 4
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5, **SIZES},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, **SIZES},
}
EXACT = 1e-8
"""Largest difference of logits, in float64, that is rounding."""


class Subject:
    """One recurrence over one backbone."""

    def __init__(self, recurrence: Mapping[str, Any], backbone: str) -> None:
        self.backbone = backbone
        self.component: Recurrence = load_recipe({"recurrence": dict(recurrence)}).component("recurrence")

    def model(self, component: Recurrence | None = None, *, seed: int = 5, **tables: Any) -> LanguageModel:
        """In float64, every parameter moved by noise."""
        component = component or self.component
        table = {"backbone": BACKBONES[self.backbone], "recurrence": to_table(component), **tables}
        recipe = load_recipe({**table, "run": {"seed": seed}})
        # A table cannot say None, which an option may be other than by default.
        recipe = dataclasses.replace(recipe, components={**recipe.components, "recurrence": component})
        model = build_model(recipe).double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return model

    def ids(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Random tokens (B, L), none of those that the recurrence reserves."""
        model_shape = load_recipe({"backbone": BACKBONES[self.backbone]}).component("backbone").shape
        reserved = self.component.reserved_ids(model_shape)
        free = torch.tensor([token for token in range(VOCABULARY) if token not in reserved])
        generator = torch.Generator().manual_seed(seed)
        return free[torch.randint(len(free), (rows, length), generator=generator)]

    @property
    def tolerance(self) -> float | None:
        """Relative change at which its iterations stop early; None if they do not."""
        tolerance: float | None = getattr(self.component, "tolerance", None)
        return tolerance

    @property
    def without_stop(self) -> Recurrence:
        """The same recurrence with early stopping off. When to stop is decided for a whole row, so that with
        it a token depends, slightly, on later ones."""
        if self.tolerance is None:
            return self.component
        off: dict[str, Any] = {"tolerance": None}
        return dataclasses.replace(self.component, **off)  # type: ignore[type-var]

    def converged(self, length: int) -> Recurrence | None:
        """The same recurrence, without early stopping, whose parallel evaluation is exact: by its own word,
        or with iterations enough for `length` tokens; None if it has no such option: one that is a table with
        a count `eval`."""
        component: Any = self.without_stop
        if component.parallel_is_exact:
            return self.without_stop
        enough: dict[str, Any] = {}
        for option in dataclasses.fields(component):
            value: Any = getattr(component, option.name)
            count = getattr(value, "eval", None)
            if dataclasses.is_dataclass(value) and isinstance(count, int):
                count = max(count, component.slots * length)
                enough[option.name] = dataclasses.replace(value, eval=count)  # type: ignore[type-var]
        if not enough:
            return None
        replaced: Recurrence = dataclasses.replace(component, **enough)
        return replaced


def stepwise(model: LanguageModel, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Logits (B, L, V), token after token through the cache."""
    cache, columns = model.cache(), []
    for at in range(ids_BL.shape[1]):
        present = None if mask_BL is None else mask_BL[:, at : at + 1]
        columns.append(model.step(ids_BL[:, at : at + 1], cache, present))
    return torch.stack(columns, dim=1)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite where either is no number."""
    largest = (one - other).abs().max().item() if one.numel() else 0.0
    return largest if largest == largest else float("inf")


def padded(lengths: list[int], *, left: bool) -> Tensor:
    """Attention mask (B, L) of rows of these lengths."""
    longest = max(lengths)
    rows = [[0] * (longest - n) + [1] * n if left else [1] * n + [0] * (longest - n) for n in lengths]
    return torch.tensor(rows)


def small_shapes() -> Iterator[tuple[int, int]]:
    """(B, L), small ones first, so that the first counterexample is the smallest."""
    yield from ((1, 1), (1, 2), (1, 3), (2, 4), (2, 6))
