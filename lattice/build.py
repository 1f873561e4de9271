"""From a recipe to a model with newly drawn weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    recurrence, shape = recipe.component("recurrence"), recipe.component("backbone").shape
    with _options_named(recipe):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Draw(recipe.run.seed, 0).integer("recurrence", 0, 2**62))
            unroll = recurrence.build(shape)
        with torch.device("meta"):
            return LanguageModel(*_parts(recipe), unroll=unroll)


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
    with _options_named(recipe):
        return LanguageModel(*_parts(recipe))


def _parts(recipe: Recipe) -> tuple[Any, ...]:
    roles = ("backbone", "recurrence", "mask", "loss", "activation_checkpoint")
    return tuple(recipe.component(role) for role in roles)


@contextmanager
def _options_named(recipe: Recipe) -> Iterator[None]:
    """Says where the recipe has an option that this backbone's shape does not allow: its name, perhaps one of
    a table's, comes first in the error."""
    try:
        yield
    except ValueError as error:
        option = str(error).split(" ", 1)[0]
        path = tuple(option.split("."))
        if not hasattr(recipe.component("recurrence"), path[0]):
            raise
        places = ("recurrence", *path), ("recurrence", path[0])
        place = next((one for one in places if one in recipe.origins), places[-1])
        raise RecipeError([f"{recipe.origin(place)}: recurrence.{error}"]) from error
