"""`run.init_from`: the weights of a Hugging Face directory as the start of a run."""

from __future__ import annotations

from pathlib import Path

from lattice.build import build_model
from lattice.console import say
from lattice.hf import scale
from lattice.hf.directory import (
    as_read,
    few,
    load_weights,
    misfits,
    read_backbone,
    read_recurrence,
    read_shapes,
)
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.protocols import Backbone
from lattice.recipe import Recipe, RecipeError

NO_DIRECTORY = (
    "no such directory: give one with config.json and model.safetensors, such as "
    "`hf download NAME --local-dir DIR` makes"
)


def problems(recipe: Recipe) -> list[str]:
    """What keeps a run from starting with these weights, found from `config.json` and the files' headers."""
    if recipe.run.init_from is None:
        return []
    folder = Path(recipe.run.init_from)
    start = f"{recipe.origin(('run', 'init_from'))}: run.init_from = '{folder}'"
    if not folder.is_dir():
        return [f"{start}: {NO_DIRECTORY}"]
    ours: Backbone = recipe.component("backbone")
    try:
        theirs = read_backbone(folder)
        shapes = read_shapes(folder)
    except (ValueError, OSError) as error:
        return [f"{start}: {line}" for line in str(error).splitlines()]
    if ours.kind != theirs.kind:  # type: ignore[attr-defined]
        return [f"{start}: its weights are of backbone.kind = '{theirs.kind}', the recipe's is '{ours.kind}'"]  # type: ignore[attr-defined]
    found = misfits(build_model(recipe, device="meta"), shapes)
    fault = f"{start}: its weights do not fit the recipe's [backbone] and [recurrence]: {few(found)}"
    return [fault] if found else []


def initialize(model: LanguageModel, recipe: Recipe) -> None:
    """Puts the weights into a newly built model and says what they do not cover. Raises RecipeError."""
    assert recipe.run.init_from is not None
    folder = Path(recipe.run.init_from)
    try:
        fresh = load_weights(model, folder)
        different = _differences(recipe.component("backbone"), read_backbone(folder))
        trained = read_recurrence(folder)
        different += [] if trained is None else scale.difference(recipe, trained)
    except (ValueError, OSError) as error:
        raise RecipeError([f"run.init_from = '{folder}': {error}"]) from error
    say(f"the weights start from '{folder}'")
    if fresh:
        say(f"newly drawn, because '{folder}' has none: {', '.join(fresh)}")
    for line in different:
        say(f"note: {line}")


def _differences(ours: Backbone, theirs: Backbone) -> list[str]:
    """Options that shape no weight, and so pass unnoticed, but change what the weights compute."""
    # What is left open is filled in, as in a `config.json`.
    mine, other = (to_table(as_read(backbone) or backbone) for backbone in (ours, theirs))
    return [
        f"backbone.{name} = {mine.get(name)} here, {other.get(name)} in the weights' config.json"
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ]
