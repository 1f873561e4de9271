"""What the checks look at: a recurrence over a tiny backbone whose weights are far from their initial values,
under a mask.

Shapes: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lattice.build import build_model
from lattice.draws import Draw
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.protocols import Mask, Recurrence, Shape
from lattice.recipe import Recipe, load_recipe
from lattice.registry import lookup

VOCABULARY, CONTEXT, LAYERS = 32, 32, 4
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
}
"""Options of a backbone that are small, where it has options so called."""
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"kind": "gpt_neox", **SIZES, "rotary_pct": 0.5},
    "llama": {"kind": "llama", **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2},
}
"""What recurrences are checked over."""
RECURRENCES: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "latent_thoughts": {"kind": "latent_thoughts", "thoughts": 2},
}
"""With what backbones and masks are checked."""
CAUSAL: dict[str, Any] = {"kind": "causal"}
BATCHES = ((1, 1), (1, 2), (1, 3), (2, 4), (2, CONTEXT))
"""(B, L), small ones first, so that the first counterexample is the smallest; the last fills the context, and
every token is in it: what a recurrence does may depend on which it is."""
EXACT = 1e-8
"""Largest difference of logits, in float64, that is rounding."""
SINGLE = 1e-5
"""Up to which it may be what float32 rounds."""


def shown(gap: float) -> str:
    """A difference in a counterexample."""
    if not EXACT < gap < SINGLE:
        return f"{gap:.1e}"
    return (
        f"{gap:.1e} (as much as float32 rounds: the models of these checks are in float64; where a component "
        "computes in float32, write tensor.to(torch.promote_types(tensor.dtype, torch.float32)))"
    )


def small(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's table with those of its sizes that are not given."""
    has = {option.name for option in dataclasses.fields(lookup("backbone", backbone["kind"]))}
    return {**{name: size for name, size in SIZES.items() if name in has}, **backbone}


class Subject:
    """One recurrence over one backbone, which is small where its table says nothing, under one mask. Raises
    RecipeError for options that cannot be, ValueError for another size than the checks need."""

    def __init__(
        self, recurrence: Mapping[str, Any], backbone: Mapping[str, Any], mask: Mapping[str, Any] = CAUSAL
    ) -> None:
        self._tables = {"backbone": small(backbone), "mask": dict(mask)}
        recipe = load_recipe({**self._tables, "recurrence": dict(recurrence)})
        self.component: Recurrence = recipe.component("recurrence")
        self.mask: Mask = recipe.component("mask")
        shape: Shape = recipe.component("backbone").shape
        needed = {"num_layers": LAYERS, "vocab_size": VOCABULARY, "context": CONTEXT}
        others = [
            f"shape.{size} is {getattr(shape, size)}, and must be {value}"
            for size, value in needed.items()
            if getattr(shape, size) != value
        ]
        if others:
            raise ValueError(
                f"backbone '{backbone['kind']}': {'; '.join(others)} for the checks: set the options that "
                "say so"
            )

    def recipe(self, component: Recurrence | None = None, **tables: Any) -> Recipe:
        component = component or self.component
        recipe = load_recipe({**self._tables, "recurrence": to_table(component), **tables})
        # A table cannot say None, which an option may be other than by default.
        return dataclasses.replace(recipe, components={**recipe.components, "recurrence": component})

    def model(self, component: Recurrence | None = None, *, seed: int = 5, **tables: Any) -> LanguageModel:
        """In float64, every parameter moved by noise."""
        model = build_model(self.recipe(component, run={"seed": seed}, **tables)).double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return model

    def ids(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Tokens (B, L): all once, in random order, and from there on any."""
        generator, count = torch.Generator().manual_seed(seed), len(self._tokens_V)
        once = torch.randperm(count, generator=generator)
        any_N = torch.randint(count, (rows * length,), generator=generator)
        return self._tokens_V[torch.cat([once, any_N])[: rows * length]].view(rows, length)

    def rotations(self, length: int) -> Tensor:
        """Tokens (V, L), of which each is at each place, in one row."""
        return torch.stack([self._tokens_V.roll(-place) for place in range(length)], dim=1)

    @cached_property
    def _tokens_V(self) -> Tensor:
        """All but those that the recurrence reserves."""
        reserved = self.component.reserved_ids(self.recipe().component("backbone").shape)
        return torch.tensor([token for token in range(VOCABULARY) if token not in reserved])

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

    def converged(self, length: int) -> Recurrence:
        """The same recurrence, without early stopping, whose parallel evaluation is exact: by its own word,
        or with iterations enough for `length` tokens. Raises ValueError where neither is so."""
        component = self.without_stop
        if component.parallel_is_exact:
            return component
        try:
            return component.with_iterations(component.slots * length)
        except ValueError as error:
            raise ValueError(f"parallel_is_exact is False, and nothing can be compared: {error}") from error


def outcome(model: LanguageModel, ids_BL: Tensor, draw: Draw | None, **inputs: Tensor) -> dict[str, Tensor]:
    """The logits (B, L, V), and in a training step, for each token, what else the recurrence adds to its loss
    (B, L, …), by the names of a counterexample."""
    stack, unrolled = model.unrolled(ids_BL, inputs.get("attention_mask"), inputs.get("documents"), draw)
    found = {"the logits": stack.logits(unrolled.hidden_BLD)}
    if draw is not None:
        for number, (hidden_BLD, weight) in enumerate(unrolled.also_predict):
            weight_BLV = weight.unsqueeze(-1) if isinstance(weight, Tensor) and weight.dim() else weight
            found[f"the logits of also_predict[{number}]"] = weight_BLV * stack.logits(hidden_BLD)
        if unrolled.penalty_BL is not None:
            found["penalty_BL"] = unrolled.penalty_BL.unsqueeze(-1)
    return found


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
