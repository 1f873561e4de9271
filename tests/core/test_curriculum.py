"""A recurrence whose training steps differ in cost: what is said of the cost is of the steps in question."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import lattice
from lattice import register
from lattice.bench import Case, Options, bench
from lattice.communication import traffic
from lattice.compare import Group, Run
from lattice.cost import Pass
from lattice.hardware import GPUS
from lattice.ledger import SAMPLED, dearest_step, ledger
from lattice.memory import step_memory
from lattice.testing import BACKBONES, assert_conforms, check_recurrence
from tests.ramped import Ramped

BACKBONE = BACKBONES["gpt_neox"]


@register("recurrence", "test_ramped_a_step_late")
@dataclass(frozen=True, kw_only=True)
class RampedAStepLate(Ramped):
    """It declares each further pass one step later than there is one."""

    def passes_at(self, shape, step):
        return [Pass(times=self.count(max(0, step - 1)))]


@register("recurrence", "test_periodic")
@dataclass(frozen=True, kw_only=True)
class Periodic(Ramped):
    """Three passes once in a while."""

    period: int = 2

    def count(self, step):
        return 3 if step % self.period == 0 else 1


@register("recurrence", "test_falling")
@dataclass(frozen=True, kw_only=True)
class Falling(Ramped):
    """It begins with the most passes."""

    def count(self, step):
        return max(1, self.most - step)


def recipe_of(steps, **options):
    run = {"steps": steps, "batch_tokens": 32, "sequence_tokens": 16, "device": "cpu"}
    recurrence = {"kind": "test_ramped", **options}
    return lattice.load_recipe({"backbone": BACKBONE, "recurrence": recurrence, "run": run})


def test_it_conforms():
    assert_conforms({"kind": "test_ramped"})


def test_a_step_that_is_not_as_declared():
    results = check_recurrence({"kind": "test_ramped_a_step_late"}, backbones=["llama"])
    assert {result.check for result in results if not result.held} == {"cost"}


def test_costs_are_those_of_the_steps_in_question():
    recipe = recipe_of(6, every=4, most=3)
    plain = ledger(lattice.load_recipe({**recipe.table(), "recurrence": {"kind": "none"}}))
    head = 3 * 2 * BACKBONE["hidden_size"] * BACKBONE["vocab_size"]
    costs = ledger(recipe)
    assert costs.training_token_passes == pytest.approx((4 * 1 + 2 * 2) / 6)
    assert costs.evaluation_token_passes == costs.inference_token_passes == 3
    of_layers = costs.training_operations - head
    assert of_layers == pytest.approx((plain.training_operations - head) * 8 / 6)
    assert ledger(recipe, steps=[3]).training_token_passes == 1
    assert ledger(recipe, steps=[3, 4]).training_token_passes == 1.5


def test_of_a_long_training_some_steps_tell():
    steps = 30 * SAMPLED
    for every in (1, 17, 5_000, 50_000):
        recurrence = Ramped(every=every, most=10)
        exact = sum(map(recurrence.count, range(steps))) / steps
        recipe = recipe_of(steps, every=every, most=10)
        assert ledger(recipe).training_token_passes == pytest.approx(exact, rel=1 / SAMPLED)


@pytest.mark.parametrize("steps", [512, 5120, SAMPLED, 2 * SAMPLED, 128_000])
@pytest.mark.parametrize("period", [2, 4, 10])
def test_what_comes_back_every_few_steps_is_met_as_often(steps, period):
    recipe = recipe_of(steps, kind="test_periodic", period=period)
    exact = 1 + 2 * sum(step % period == 0 for step in range(steps)) / steps
    # A share of draws from parts of equal length has a standard deviation of at most 1 / (2 sqrt(SAMPLED)).
    limit = 0 if steps <= SAMPLED else 2 * 4 / (2 * SAMPLED**0.5)
    assert abs(ledger(recipe).training_token_passes - exact) <= limit + 1e-9


def test_memory_is_that_of_the_dearest_step():
    def activations(steps, **options):
        return step_memory(recipe_of(steps, **options), rows=1, length=16).activations

    falling = {"kind": "test_falling", "most": 4}
    assert dearest_step(recipe_of(40, **falling)) == 0
    assert dearest_step(recipe_of(40, every=4, most=3)) == 39
    assert activations(40, **falling) == activations(1, **falling)
    assert activations(40, every=50) < 0.9 * activations(1, **falling)


def test_what_ranks_gather_is_the_mean_of_the_steps():
    recipe = recipe_of(6, every=4, most=3)
    found = traffic(recipe, ledger(recipe), GPUS["h100-80gb"], 8, micro_batches=1, compute_seconds=1.0)
    gathers = {one.reshard: one.layer_gathers for one in found}
    assert gathers["pass"] == pytest.approx(2 * 8 / 6)


def test_bench_counts_the_steps_that_it_measures():
    case = Case(label="ramped", thoughts=2, recipe=recipe_of(6, every=4, most=3))
    (row,) = bench([case], Options(repetitions=3, warm_up=0, batch=1))
    assert row["ledger"]["training_token_passes"] == pytest.approx((2 + 2 + 1) / 3)


def test_operations_along_the_training():
    group = Group("ramped", (Run(Path("nowhere"), recipe_of(6, every=4, most=3), {}),))
    first, last = (group.training_operations_by(tokens) for tokens in (4 * 32, 6 * 32))
    assert last == group.training_operations == pytest.approx(6 * 32 * group.costs.training_operations)
    assert first == pytest.approx(4 * 32 * ledger(group.recipe, steps=[0]).training_operations)
    assert group.training_operations_by(0) == 0
