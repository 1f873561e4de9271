"""Where each value of a recipe comes from: its file and line."""

from pathlib import Path

import pytest
import tomli

from lattice.recipe import load_recipe
from tests.recipe.texts import WRITTEN, leaves

LINES = {
    "run.seed": 2,
    "run.steps": 3,
    "backbone.kind": 6,
    "backbone.hidden_size": 7,
    "backbone.num_attention_heads": 9,
    "recurrence.kind": 12,
    "recurrence.jacobi.train": 13,
    "recurrence.jacobi.eval": 13,
    "recurrence.thoughts": 16,
    "optimizer.kind": 18,
    "optimizer.betas": 19,
    "optimizer.lr": 24,
    "evaluators.a.kind": 26,
    "evaluators.a.prompt": 27,
    "evaluators.a.every": 31,
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_leaf_knows_its_line(newline, write):
    recipe = load_recipe(write("r.toml", WRITTEN.replace("\n", newline)))
    assert recipe.run.steps == 12
    found = {".".join(path): str(recipe.origin(path)) for path, _ in leaves(tomli.loads(WRITTEN))}
    assert found.pop("evaluators.b.c.kind") == "r.toml:33"
    assert found == {key: f"r.toml:{line}" for key, line in LINES.items()}


def test_a_line_separator_that_toml_does_not_know_counts_no_line(problems):
    text = "# \u2028 \u0085\n[evaluators.s]\nkind = 'sample'\nprompt = '\u2028'\n[run]\nstepz = 1\n"
    assert problems(text)[0].startswith("bad.toml:6: run.stepz")


def test_every_leaf_of_the_resolved_recipe_has_an_origin(write):
    recipe = load_recipe(write("r.toml", WRITTEN), ["run.log_every=3"])
    origins = {path: str(recipe.origin(path)) for path, _ in leaves(recipe.table())}
    written = {path: origin for path, origin in origins.items() if origin.startswith("r.toml:")}
    assert len(written) == len(LINES) + 1
    assert origins[("run", "log_every")] == "--set"
    assert origins[("optimizer", "eps")] == "default of adamw"
    assert origins[("mask", "kind")].startswith("lattice/defaults.toml:")
    defaults = (Path(__file__).parents[2] / "lattice" / "defaults.toml").read_text().splitlines()
    assert defaults[int(origins[("mask", "kind")].split(":")[1]) - 1] == 'kind = "causal"'
