"""Every recipe that is shipped is parsed, checked and assembled."""

import itertools
from pathlib import Path

import pytest
import torch

import lattice
from lattice.study import read_study
from tests.built_in import built_in

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob("*.toml"))
STUDIES = [path for path in sorted((RECIPES / "study").glob("*.toml")) if "[study]" in path.read_text()]

# Parameters as the published checkpoints count them (Pythia: arXiv 2304.01373, table 1 and its model cards).
PYTHIA = {
    "14m": 14_067_712,
    "70m": 70_426_624,
    "160m": 162_322_944,
    "410m": 405_334_016,
    "1b": 1_011_781_632,
    "1.4b": 1_414_647_808,
    "2.8b": 2_775_208_960,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_assembles_and_runs_on_the_meta_device(name):
    recipe = lattice.load_recipe(RECIPES / name)
    assert recipe.dropped == ()
    model = lattice.build_model(recipe, device="meta")
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    assert model(ids).logits.shape == (1, 8, recipe.component("backbone").vocab_size)
    assert lattice.load_recipe(recipe.table()).table() == recipe.table()


@pytest.mark.parametrize("size", PYTHIA)
def test_pythia_has_the_published_number_of_parameters(size):
    model = lattice.build_model(RECIPES / f"pythia_{size}.toml", device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PYTHIA[size]


THINKING = [name for name in SHIPPED if name.startswith(("pythia", "llama")) and name.count("_") > 1]


@pytest.mark.parametrize("name", THINKING)
def test_recipes_differ_from_the_plain_one_by_the_recurrence_alone(name):
    family, size, _ = name.split("_", maxsplit=2)
    plain = lattice.load_recipe(RECIPES / f"{family}_{size}.toml").table()
    thinking = lattice.load_recipe(RECIPES / name).table()
    assert thinking.pop("recurrence")["kind"] != "none"
    assert plain.pop("recurrence")["kind"] == "none"
    assert thinking == plain


def test_every_kind_of_recurrence_has_a_recipe():
    shown = {lattice.load_recipe(RECIPES / name).component("recurrence").kind for name in SHIPPED}
    assert shown == built_in("recurrence")


def test_the_papers_settings():
    """Section 4.1 of arXiv 2509.23184: Pythia's set-up, sequences of 2048, about 300B tokens."""
    recipe = lattice.load_recipe(RECIPES / "pythia_1.4b_lt.toml")
    assert recipe.run.steps * recipe.run.batch_tokens == pytest.approx(300e9, rel=1e-3)
    assert recipe.run.sequence_tokens == 2048
    recurrence = recipe.component("recurrence")
    assert (recurrence.thoughts, recurrence.jacobi.train, recurrence.jacobi.eval) == (1, (2, 4), 3)
    assert recurrence.token_passes(recipe.component("backbone").shape, training=False) == 9


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_are_fair(path):
    study = read_study(path)
    assert len(study.seeds) >= 2 or path.stem != "thoughts"  # the others are tried beside it
    batches = {(arm.recipe.run.batch_tokens, arm.recipe.run.sequence_tokens) for arm in study.arms}
    assert len(batches) == 1
    ratios = [float(arm.matched.split()[1]) for arm in study.arms if arm.matched]
    assert all(ratio == pytest.approx(1, abs=0.15) for ratio in ratios)
    recipes = [arm.recipe.table() for arm in study.arms]
    assert all(one != other for one, other in itertools.combinations(recipes, 2))
