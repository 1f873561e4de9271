"""The scale of the embeddings that weights were trained with: another recurrence goes on with the same."""

from __future__ import annotations

import dataclasses

from lattice.protocols import Recurrence, Shape, kind_of
from lattice.recipe import Recipe

OPTION = "embed_scale"


def kept(recipe: Recipe, trained: Recurrence) -> list[str]:
    """The override that gives the recipe's recurrence the scale of the one the weights were `trained` with;
    none where it has no such option, where somebody set it, or where its own default is the same."""
    ours: Recurrence = recipe.component("recurrence")
    shape: Shape = recipe.component("backbone").shape
    if _chosen(recipe) or OPTION not in {option.name for option in dataclasses.fields(ours)}:  # type: ignore[arg-type]
        return []
    scale = trained.embedding_scale(shape)
    if kind_of(ours) == kind_of(trained) and ours.embedding_scale(shape) == scale:
        return []
    return [f"recurrence.{OPTION}={scale}"]


def difference(recipe: Recipe, trained: Recurrence) -> list[str]:
    """What to say where the scale is another than that of the weights and nobody chose it."""
    ours: Recurrence = recipe.component("recurrence")
    shape: Shape = recipe.component("backbone").shape
    scale, before = ours.embedding_scale(shape), trained.embedding_scale(shape)
    if _chosen(recipe) or scale == before:
        return []
    return [
        f"recurrence '{kind_of(ours)}' multiplies the embeddings by {scale:.6g}; the weights were trained "
        f"with {before:.6g}, which recurrence.{OPTION} sets where a kind has that option"
    ]


def _chosen(recipe: Recipe) -> bool:
    return ("recurrence", OPTION) in recipe.origins
