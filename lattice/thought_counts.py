"""How often a recipe thinks before each token, and the same recipe with another count."""

from __future__ import annotations

import json
from contextlib import suppress

from lattice.options import to_table
from lattice.protocols import Recurrence
from lattice.recipe import Recipe, load_recipe
from lattice.run_folder import trained_as

MOST = 64
"""Counts that are tried to find a recipe's own."""


def with_thoughts(recipe: Recipe, count: int, *, drawn: bool = True) -> Recipe:
    """The same recipe with `count` thoughts before each token. Unless `drawn`, each training step takes as
    many iterations as evaluation, so that all steps cost the same. Raises ValueError for a count that the
    recurrence cannot have."""
    recurrence: Recurrence = recipe.component("recurrence")
    counted = load_recipe({**recipe.table(), "recurrence": to_table(recurrence.with_thoughts(count))})
    return counted if drawn else as_evaluated(counted)


def as_evaluated(recipe: Recipe) -> Recipe:
    """The same recipe with as many iterations in each training step as at evaluation, where the recurrence
    has a table of both."""
    table = to_table(recipe.component("recurrence"))
    for value in table.values():
        if isinstance(value, dict) and {"train", "eval"} <= value.keys():
            value["train"] = [value["eval"]] * 2
    return load_recipe({**recipe.table(), "recurrence": table})


def with_iterations(recipe: Recipe, count: int) -> Recipe:
    """The same recipe with `count` iterations of its recurrence at evaluation. Raises ValueError for a count
    that the recurrence cannot have."""
    recurrence: Recurrence = recipe.component("recurrence")
    return load_recipe({**recipe.table(), "recurrence": to_table(recurrence.with_iterations(count))})


def counted(recipe: Recipe, thoughts: int | None, iterations: int | None) -> Recipe:
    """The same recipe with these counts; None leaves one as it is. Raises ValueError as the two above."""
    if thoughts is not None:
        recipe = with_thoughts(recipe, thoughts)
    return recipe if iterations is None else with_iterations(recipe, iterations)


def thoughts_of(recipe: Recipe) -> int | None:
    """How often a recipe thinks before each token; None of a recurrence without such a count."""
    recurrence: Recurrence = recipe.component("recurrence")
    for count in range(MOST):
        with suppress(ValueError):
            if recurrence.with_thoughts(count) == recurrence:
                return count
    return None


def own_thoughts(recipe: Recipe) -> int:
    """What a recipe is called by where numbers of thoughts are compared: as often as it thinks at evaluation,
    or, of a recurrence without such a count, its slots beside the token's own."""
    recurrence: Recurrence = recipe.component("recurrence")
    count = thoughts_of(as_evaluated(recipe))
    return recurrence.slots - 1 if count is None else count


def family(recipe: Recipe) -> tuple[str, str] | None:
    """What recipes that differ in their number of thoughts alone have in common: all of the training and the
    recurrence's kind; and how they think, which says nothing where they do not. None without such a count."""
    recurrence: Recurrence = recipe.component("recurrence")
    try:
        thinking = to_table(recurrence.with_thoughts(0))
    except ValueError:
        return None
    options = trained_as(recipe)
    trained = {key: value for key, value in options.items() if not key.startswith("recurrence.")}
    return json.dumps([thinking["kind"], trained], sort_keys=True), json.dumps(thinking, sort_keys=True)
