"""A recipe at another number of thoughts."""

from __future__ import annotations

from lattice.options import to_table
from lattice.protocols import Recurrence
from lattice.recipe import Recipe, load_recipe


def with_thoughts(recipe: Recipe, count: int, *, drawn: bool = True) -> Recipe:
    """The same recipe with `count` thoughts before each token. Unless `drawn`, each training step takes as
    many iterations as evaluation, so that all steps cost the same. Raises ValueError for a count that the
    recurrence cannot have."""
    recurrence: Recurrence = recipe.component("recurrence")
    table = to_table(recurrence.with_thoughts(count))
    for value in table.values():
        if not drawn and isinstance(value, dict) and {"train", "eval"} <= value.keys():
            value["train"] = [value["eval"]] * 2
    return load_recipe({**recipe.table(), "recurrence": table})
