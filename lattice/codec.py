"""A recipe's tokenizer: opened for a model whose table has room for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lattice.protocols import Backbone, Codec, Data, Recurrence, Tokenizer, kind_of
from lattice.recipe import Recipe, RecipeError


def open_codec(recipe: Recipe, folder: Path | None) -> Codec:
    """The recipe's tokenizer, from `folder` where an earlier run saved it."""
    data: Data = recipe.component("data")
    tokenizer: Tokenizer = recipe.component("tokenizer")
    saved = folder is not None and folder.exists()
    codec = tokenizer.build(folder, data.corpus())
    try:
        return _fitting(recipe, codec)
    except RecipeError:
        if folder is not None and not saved:  # else it would be the tokenizer of the recipe that is put right
            shutil.rmtree(folder, ignore_errors=True)
        raise


def saved_codec(recipe: Recipe, run: Path, facts: Mapping[str, Any]) -> Codec:
    """The tokenizer that a run was trained with, as the facts of its checkpoint tell it. Raises ValueError
    for another one, FileNotFoundError where it is gone."""
    tokenizer: Tokenizer = recipe.component("tokenizer")
    folder = run / "tokenizer"
    trained_with = facts.get("tokenizer")
    if folder.is_dir():
        return _fitting(recipe, _same(tokenizer.build(folder), str(folder), trained_with))
    try:
        return _fitting(recipe, _same(tokenizer.build(None), tokenizer.spec, trained_with))
    except (ValueError, OSError) as error:
        raise FileNotFoundError(
            f"'{run}' has no tokenizer: restore its directory 'tokenizer', from `lattice run`: {error}"
        ) from error


def _same(codec: Codec, name: str, trained_with: str | None) -> Codec:
    """Raises ValueError for a tokenizer that the weights do not know; an old checkpoint does not tell."""
    if trained_with not in (None, codec.fingerprint):
        raise ValueError(
            f"tokenizer '{name}' has the fingerprint {codec.fingerprint[:12]}, the one that the checkpoint "
            f"was trained with has {trained_with[:12]}: its tokens are others; restore that one"
        )
    return codec


def _fitting(recipe: Recipe, codec: Codec) -> Codec:
    """Raises RecipeError for a tokenizer that the model's table has no room for."""
    backbone: Backbone = recipe.component("backbone")
    vocabulary = backbone.shape.vocab_size
    if codec.vocab_size > vocabulary:
        raise RecipeError(
            [
                f"backbone.vocab_size = {vocabulary}: the tokenizer has {codec.vocab_size} tokens; "
                f"must be at least that"
            ]
        )
    _check_reserved(recipe, codec.vocab_size)
    return codec


def _check_reserved(recipe: Recipe, tokens: int) -> None:
    """A row of the table that the recurrence uses must not be a token's."""
    backbone: Backbone = recipe.component("backbone")
    recurrence: Recurrence = recipe.component("recurrence")
    taken = [row for row in recurrence.reserved_ids(backbone.shape) if row < tokens]
    if taken:
        kind = kind_of(recurrence)
        raise RecipeError(
            [
                f"recurrence '{kind}' uses row {taken[0]} of the embedding table, which is a token of the "
                f"tokenizer's {tokens}: raise backbone.vocab_size to {tokens + 1} at least, and name a row "
                "from there on if the recipe names one"
            ]
        )
