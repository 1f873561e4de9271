"""Recipes as damaged text: a recipe that holds what the file says, or problems that name the place."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattice.recipe import Recipe, RecipeError, load_recipe
from lattice.run_folder import leaves
from tests.fuzz.damage import damaged_bytes

BASE = b'[run]\nseed = 3\n[schedule]\nkind = "linear"\nwarmup = 0.1\n'
TEXT = """\
extends = ["base.toml"]

[run]                                      # é
steps = 20
batch_tokens = 64
sequence_tokens = 32

[backbone]
kind = "gpt_neox"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2

[recurrence]
kind = "latent_thoughts"
jacobi = { train = [2, 4], eval = 3 }

[optimizer]
kind = "adamw"
lr = 1e-3
betas = [
  0.9,
  0.95,
]

[evaluators.sample]
kind = "sample"
prompt = \"""
def f(x):
\"""
""".encode()
# fmt: off
TOKENS = [
    b"[run]\n", b"[", b"]\n", b"[[metrics]]\n", b"[metrics.board]\n", b"kind = ", b'"none"', b'"""', b"'''",
    b"inf", b"nan", b"true", b"1979-05-27", b"07:32:00", b"0x" + b"f" * 40, b"1_000", b"-0.0", b".", b"=",
    b'extends = "base.toml"\n', b'extends = "top.toml"\n', b'extends = "\\u0000"\n', b"extends = 3\n",
    b'imports = ["no_such_module"]\n', b'imports = ["no_such.py"]\n', b'imports = ["\\u0000.py"]\n',
    b"0x" + b"f" * 5000, b"a." * 2000, b"\xc2\x85", b"\xe2\x80\xa8", b"x = 1\n", b"data = 1\n",
]
# fmt: on
INPUTS = settings(deadline=None, suppress_health_check=list(HealthCheck))
"""As many as the profile says."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    before, here = Path.cwd(), tmp_path_factory.mktemp("recipes")
    (here / "base.toml").write_bytes(BASE)
    os.chdir(here)
    yield here
    os.chdir(before)


def answer(recipe: Path | dict[str, Any], overrides: list[str]) -> Recipe | list[str]:
    """The recipe or its problems; all else that is raised is a failure of the test."""
    try:
        return load_recipe(recipe, overrides)
    except RecipeError as error:
        return error.problems
    except OSError as error:
        return [str(error)]


def same(said: Any, held: Any) -> bool:
    if isinstance(said, list | tuple) and isinstance(held, list | tuple):
        return len(said) == len(held) and all(map(same, said, held))
    return said == held and not (isinstance(said, float) and math.isnan(said))


def check_holds(recipe: Recipe, said: dict[str, Any]) -> None:
    """Nothing that was said is lost on the way."""
    held = leaves(recipe.table())
    for key, value in leaves({k: v for k, v in said.items() if k not in ("extends", "imports")}).items():
        assert same(value, held[key]), f"{key} = {value!r} became {held[key]!r}"


@INPUTS
@given(damaged_bytes(TEXT, TOKENS))
def test_a_file(folder: Path, content: bytes) -> None:
    path = folder / "top.toml"
    path.write_bytes(content)
    found = answer(path, [])
    if isinstance(found, Recipe):
        check_holds(found, tomli.loads(content.decode()))
        return
    assert found
    for problem in found:
        assert "top.toml" in problem or "base.toml" in problem, problem


# fmt: off
PIECES = [
    "run", "steps", "backbone", "kind", "extends", "imports", "a.b=1", ".", "=", "[", "]", "{", "}", '"', "'",
    "\n", "#", "1", "-1", "1e3", "nan", "2020-01-01", "9" * 5000, "[" * 3000, "\0", "\udcff", "é", "x" * 40,
]
# fmt: on
OVERRIDE = st.one_of(
    st.builds(
        "{}.{}={}".format,
        st.sampled_from(["run", "backbone", "recurrence.jacobi", "optimizer", "metrics.board", "x"]),
        st.sampled_from(["steps", "seed", "kind", "train", "lr", "betas", ""]),
        st.sampled_from(["1", "[1, 2]", "none", '"adamw"', "{a = 1}", "inf"]) | st.text(max_size=5),
    ),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
)


@INPUTS
@given(st.lists(OVERRIDE, min_size=1, max_size=3))
def test_what_is_set(folder: Path, overrides: list[str]) -> None:
    (folder / "top.toml").write_bytes(TEXT)
    found = answer(folder / "top.toml", overrides)
    if isinstance(found, Recipe):
        last = {key.strip(): value for key, _, value in (one.partition("=") for one in overrides)}
        held = found.table()
        for key in last:
            for name in (part.strip(" \"'") for part in key.split(".")):
                held = held[name] if isinstance(held, dict) else pytest.fail(f"{key} is not held")
            held = found.table()
        return
    assert found
    for problem in found:
        assert "--set" in problem or "top.toml" in problem, problem
