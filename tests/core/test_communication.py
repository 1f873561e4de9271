"""What ranks send each other, against arithmetic by hand and the counts of FSDP2."""

from __future__ import annotations

import pytest

import lattice
from lattice.communication import bandwidth, slots_to_hide, traffic
from lattice.hardware import GPU, GPUS
from lattice.ledger import ledger

TOY = GPU(1e9, 1e12, "toy", link=40.0, network=5.0, node=4)


def recipe_of(**tables):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
    return lattice.load_recipe({"backbone": {"kind": "gpt_neox", **sizes}, **tables})


def of(recipe, gpus=8, **changes):
    options = {"micro_batches": 1, "compute_seconds": 2.0, **changes}
    found = traffic(recipe, ledger(recipe), TOY, gpus, **options)
    return {(one.shards, one.reshard): one for one in found}


def test_a_step_by_hand():
    recipe = recipe_of(precision={"kind": "bf16"})
    costs = ledger(recipe)
    layers, others = costs.layer_parameters, costs.parameters - costs.layer_parameters
    over_all, in_a_node = of(recipe)[8, "step"], of(recipe)[4, "step"]
    assert over_all.gathered == pytest.approx(7 / 8 * (2 * layers + 4 * others))
    assert over_all.reduced == pytest.approx(7 / 8 * 4 * costs.parameters)
    assert over_all.seconds == pytest.approx((over_all.gathered + over_all.reduced) / 20)  # 4 cards of 5
    assert over_all.share == pytest.approx(over_all.seconds / 2)
    summed = 2 * 1 / 2 * 4 * costs.parameters / 4
    assert in_a_node.replicas == 2
    assert in_a_node.gathered == pytest.approx(3 / 4 * (2 * layers + 4 * others))
    assert in_a_node.reduced == pytest.approx(3 / 4 * 4 * costs.parameters + summed)
    scattered = in_a_node.reduced - summed
    assert in_a_node.seconds == pytest.approx((in_a_node.gathered + scattered) / 40 + summed / 5)


@pytest.mark.parametrize(
    ("tables", "gathers"),
    [
        ({}, 2),
        (
            {"recurrence": {"kind": "loop", "loops": 3}},
            8,
        ),  # measured of FSDP2: 3 layers and the root 25 times
        ({"recurrence": {"kind": "loop", "loops": 3}, "activation_checkpoint": {"kind": "pass"}}, 12),
        ({"recurrence": {"kind": "depth", "repetitions": {"train": [4, 4]}, "grad_passes": 1}}, None),
    ],
)
def test_layers_are_gathered_once_a_step_or_with_every_pass(tables, gathers):
    found = of(recipe_of(**tables), micro_batches=3)
    assert found[8, "step"].layer_gathers == 1
    if gathers is None:  # passes without gradients are gathered for the forward pass alone
        assert found[8, "pass"].layer_gathers < 3 * 2 * 4
    else:
        assert found[8, "pass"].layer_gathers == 3 * gathers
    assert found[8, "pass"].reduced == pytest.approx(3 * found[8, "step"].reduced)


def test_one_node_has_no_replicas_and_one_rank_no_traffic():
    assert {shards for shards, _ in of(recipe_of(), gpus=4)} == {4}
    assert {shards for shards, _ in of(recipe_of(), gpus=6)} == {6}  # no whole nodes
    assert of(recipe_of(), gpus=1)[1, "pass"].seconds == 0


def test_bandwidths():
    assert [bandwidth(TOY, ranks) for ranks in (2, 4, 8)] == [40, 40, 20]
    for gpu in GPUS.values():
        assert gpu.network < bandwidth(gpu, 16) <= gpu.link
    fp32, bf16 = (
        slots_to_hide(recipe_of(precision={"kind": kind}), TOY, 8, 0.5) for kind in ("fp32", "bf16")
    )
    assert fp32 == 2 * bf16 == 1e12 * 0.5 * 4 / (2 * 20)
