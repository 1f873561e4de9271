"""A recipe's tokenizer: opened for a model whose table has room for it."""

from __future__ import annotations

import shutil
from pathlib import Path

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


def saved_codec(recipe: Recipe, run: Path) -> Codec:
    """The tokenizer that a run was trained with. Raises FileNotFoundError where it is gone: one that was
    trained anew might be another."""
    tokenizer: Tokenizer = recipe.component("tokenizer")
    folder = run / "tokenizer"
    if folder.is_dir():
        return _fitting(recipe, tokenizer.build(folder))
    try:
        return _fitting(recipe, tokenizer.build(None))
    except (ValueError, OSError) as error:
        raise FileNotFoundError(
            f"'{run}' has no tokenizer: restore its directory 'tokenizer', from `lattice run`: {error}"
        ) from error


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
