"""Recipes on disk, and what is wrong with them."""

import pytest

from lattice.recipe import RecipeError, load_recipe


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the current directory, so that messages name them by their short name."""
    monkeypatch.chdir(tmp_path)

    def write_(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text, encoding="utf-8", newline="")
        return path

    return write_


@pytest.fixture
def problems(write):
    """The problems of a recipe with this text."""

    def problems_(text, overrides=()):
        with pytest.raises(RecipeError) as caught:
            load_recipe(write("bad.toml", text), overrides)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return caught.value.problems

    return problems_
