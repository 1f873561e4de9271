"""From a recipe to a model with newly drawn weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lattice.draws import Draw
from lattice.model import LanguageModel
from lattice.recipe import Recipe, RecipeError, load_recipe


def build_model(recipe: str | Path | Mapping[str, Any] | Recipe, *, device: str = "cpu") -> LanguageModel:
    """A model with newly drawn weights; `[backbone]` and `[recurrence]` are all the recipe needs.

    The weights depend on `run.seed` alone. `device = "meta"` allocates nothing. Raises RecipeError.
    """
    recipe = load_recipe(recipe)
    model = weightless_model(recipe)
    if device == "meta":
        return model.to(device)
    draw_weights(model, recipe, torch.device("cpu"))
    return model.to(device)


def weightless_model(recipe: Recipe) -> LanguageModel:
    """Its decoder is on the meta device, where it can be divided among ranks before it has weights. What a
    recurrence has of its own is small: it is drawn by what builds it."""
    with torch.device("meta"):
        model = undrawn_model(recipe)
    if isinstance(model.unroll, torch.nn.Module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Draw(recipe.run.seed, 0).integer("recurrence", 0, 2**62))
            model.unroll = model.recurrence.build(model.shape)
    return model


def draw_weights(model: LanguageModel, recipe: Recipe, device: torch.device) -> None:
    """Gives a weightless model its weights on `device`; where it is divided among ranks, each its share.

    They are drawn on the CPU, one after the other, so that a seed means the same weights on every device and
    on any number of ranks, and no rank ever holds more than one whole."""
    model.decoder.allocate(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model.decoder.initialize(model.recurrence.initialization(model.shape))


def undrawn_model(recipe: Recipe) -> LanguageModel:
    """The modules, on the current default device, their weights not drawn. Raises RecipeError."""
    roles = ("backbone", "recurrence", "mask", "loss", "activation_checkpoint")
    try:
        return LanguageModel(*(recipe.component(role) for role in roles))
    except ValueError as error:  # an option that this backbone's shape does not allow; its name comes first
        option = str(error).split(" ", 1)[0]
        if not hasattr(recipe.component("recurrence"), option):
            raise
        raise RecipeError([f"{recipe.origin(('recurrence', option))}: recurrence.{error}"]) from error
