"""`lattice import`: a recipe that starts a run from the weights of a Hugging Face directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from lattice.atomic import write_file
from lattice.hf import init_from, scale
from lattice.hf.directory import describe
from lattice.options import to_table
from lattice.protocols import Backbone, Tokenizer
from lattice.recipe import Recipe, RecipeError, load_recipe
from lattice.registry import defining

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Files that are a directory's tokenizer, the first that there is."""
DEFAULT = "lattice/defaults.toml"
WRITTEN = ("dict", "--set")
"""Origins of the values that belong into the new recipe; all others come from what it extends."""


def import_recipe(
    folder: str | Path,
    to: str | Path,
    *,
    overrides: Sequence[str] = (),
    extends: Sequence[str | Path] = (),
    trust_imports: bool = False,
) -> Recipe:
    """Writes the recipe `to` and returns it; `lattice run` then trains from the weights in `folder`.

    `overrides` are `table.key=value` and `extends` recipes, as paths from here; both are written into the new
    recipe. A recurrence with an option `embed_scale` gets the scale that the weights were trained with where
    nobody sets it. Raises FileExistsError, FileNotFoundError, RecipeError and ValueError before
    anything is written.
    """
    folder, to = Path(folder), Path(to)
    if to.exists():
        raise FileExistsError(f"'{to}' exists: choose another name with --to, or remove it")
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}': {init_from.NO_DIRECTORY}")
    description = describe(folder, trust_imports=trust_imports)
    tables: dict[str, Any] = {"run": {"init_from": str(folder)}, **description.tables}
    if description.imports:
        tables["imports"] = list(description.imports)
    if extends:
        tables["extends"] = [os.path.abspath(name) for name in extends]
    tables |= _tokenizer(folder)
    recipe = load_recipe(tables, overrides)
    if scaled := scale.kept(recipe, description.recurrence):
        recipe = load_recipe(tables, [*overrides, *scaled])
    _check(recipe, folder)
    write_file(to, _text(recipe, folder, to, extends, scaled).encode())
    return recipe


def _tokenizer(folder: Path) -> dict[str, Any]:
    """The recipe's table for the tokenizer of a directory; nothing where there is none."""
    path = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if path is None:
        return {}
    claims = [cls.from_spec(str(path)) for cls in defining("tokenizer", "from_spec").values()]  # type: ignore[attr-defined]
    return next(({"tokenizer": to_table(component)} for component in claims if component is not None), {})


def _check(recipe: Recipe, folder: Path) -> None:
    """Raises RecipeError where weights or tokenizer do not fit what the recipe has become."""
    problems = init_from.problems(recipe)
    origin = recipe.origin(("tokenizer", "kind"))
    if origin.place == DEFAULT:
        problems.append(
            f"'{folder}' has no tokenizer.json and no tokenizer.model, and the weights mean nothing without "
            "their tokenizer: say which with --set tokenizer.kind=huggingface tokenizer.name=PATH"
        )
    elif origin.place == "dict":
        problems += _tokenizer_problems(recipe)
    if problems:
        raise RecipeError(problems)


def _tokenizer_problems(recipe: Recipe) -> list[str]:
    tokenizer: Tokenizer = recipe.component("tokenizer")
    backbone: Backbone = recipe.component("backbone")
    try:
        codec = tokenizer.build(None)
    except (ValueError, OSError) as error:
        return [f"tokenizer: {error}. Options are given with --set tokenizer.OPTION=VALUE"]
    if codec.vocab_size > backbone.shape.vocab_size:
        return [f"tokenizer: has {codec.vocab_size} tokens, the weights {backbone.shape.vocab_size} rows"]
    return []


# ── the text ──────────────────────────────────────────────────────────────────────────────────────
def _text(
    recipe: Recipe, folder: Path, to: Path, extends: Sequence[str | Path], scaled: Sequence[str]
) -> str:
    written = _written(recipe, recipe.table(), ())
    table: dict[str, Any] = {}
    if extends:
        table["extends"] = [os.path.relpath(name, to.parent) for name in extends]
    if recipe.imports:
        table["imports"] = list(recipe.imports)
    text = tomli_w.dumps(table | written)
    if scaled:
        line = f"{scale.OPTION} = {getattr(recipe.component('recurrence'), scale.OPTION)}"
        assert text.count(f"{line}\n") == 1
        text = text.replace(line, f"{line:<42}# as the weights were trained")
    return f"# Starts from the weights in {folder}; made from its config.json by `lattice import`.\n{text}"


def _written(recipe: Recipe, table: dict[str, Any], above: tuple[str, ...]) -> dict[str, Any]:
    """The part of a resolved table that neither defaults nor extended recipes say."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        path = (*above, name)
        if isinstance(value, dict) and (part := _written(recipe, value, path)):
            found[name] = part
        elif not isinstance(value, dict) and recipe.origin(path).place in WRITTEN:
            found[name] = value
    return found
