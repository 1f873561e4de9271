"""Recipes with values that do not belong: the answer is a recipe or its problems."""

import tomli
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattice.recipe import RecipeError, load_recipe
from tests.recipe.texts import WRITTEN, leaves

VALID = tomli.loads(WRITTEN)
KEYS = st.sampled_from(["kind", "steps", "train", "jacobi", "imports", "extends", "x", "", "a.b", "run", "é"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["none", "latent_thoughts", "sample", "cpu", "default"])
    | st.dates()
    | st.times()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


def without_none(value):
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value if one is not None] if isinstance(value, list) else value


@st.composite
def damaged(draw):
    """A valid recipe with one to three places changed, removed or added."""

    def damage(table, path, value):
        key = path[0]
        if len(path) > 1 and isinstance(table.get(key), dict):
            return {**table, key: damage(table[key], path[1:], value)}
        return {**table, key: value}

    table = VALID
    places = [path for path, _ in leaves(VALID)] + [(key,) for key in VALID]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places))
        path = draw(st.sampled_from([path, (*path[:-1], draw(KEYS))]))
        table = damage(table, path, draw(VALUES))
    return without_none(table)


def problems_of(recipe, overrides=()):
    """None, or the problems; any other exception than those promised passes through."""
    try:
        load_recipe(recipe, overrides)
    except FileNotFoundError as error:
        return [str(error)]
    except RecipeError as error:
        return error.problems
    return None


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(table=damaged())
def test_whatever_a_recipe_holds_the_answer_is_a_recipe_or_its_problems(table, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8", newline="")
    for recipe, place in ((path, "damaged.toml"), (table, "dict")):
        found = problems_of(recipe)
        if found is None:
            loaded = load_recipe(recipe)
            again = load_recipe(loaded.table())
            assert repr((again.run, again.components)) == repr((loaded.run, loaded.components))
            continue
        assert found
        for problem in found:
            assert place in problem or "does not exist" in problem, problem


SET = st.tuples(KEYS, KEYS, st.text(max_size=6) | st.sampled_from(["1", "[1]", "{a=1}"]))


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(SET, max_size=3))
def test_whatever_is_set_the_answer_is_a_recipe_or_its_problems(overrides):
    found = problems_of(VALID, [f"{table}.{key}={value}" for table, key, value in overrides])
    assert found is None or all(one.startswith(("--set", "dict")) for one in found), found
