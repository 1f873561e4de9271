"""What a recurrence adds to the loss of a training step, against the same by hand."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import lattice
from lattice.draws import Draw
from lattice.testing import BACKBONES, assert_conforms
from tests.halting import Halting  # noqa: F401
from tests.supervised import Supervised

DRAW = Draw(0, 3)


def model_of(**options):
    table = {"kind": Supervised.kind, **options}
    return lattice.build_model({"backbone": BACKBONES["llama"], "recurrence": table}).double()


@pytest.fixture
def batch():
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[0, 6:] = -100
    return ids, targets


def by_hand(model, ids, targets, weight, penalty):
    """The objective, and the part of it that is the loss, from logits that are all held."""
    decoder, counts = model.decoder, targets != -100
    seen = []
    handle = decoder.final_norm.register_forward_hook(lambda module, given, out: seen.append(out.squeeze(2)))
    model(ids)
    handle.remove()
    first, last = (F.cross_entropy(decoder.head(hidden)[counts], targets[counts]) for hidden in seen)
    return last + weight * first + penalty * seen[1].square().mean(-1)[counts].mean(), last


def test_objective_and_gradients(batch):
    ids, targets = batch
    model = model_of(weight=0.3, penalty=0.7)
    expected, loss = by_hand(model, ids, targets, 0.3, 0.7)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    output = model(ids, targets=targets, draw=DRAW)
    torch.testing.assert_close(output.objective, expected, check_dtype=False)
    torch.testing.assert_close(output.loss, loss, check_dtype=False)
    added = (expected - loss).float()
    torch.testing.assert_close(output.auxiliary_sum / output.count, added, check_dtype=False)
    found = torch.autograd.grad(output.objective, list(model.parameters()))
    torch.testing.assert_close(found, gradients)


def test_a_recurrence_that_learns_when_to_halt(batch):
    """PonderNet, equations 6 and 7, from logits that are all held."""
    ids, targets = batch
    model = lattice.build_model(
        {
            "backbone": BACKBONES["llama"],
            "recurrence": {"kind": "test_halting", "steps": 3, "prior": 0.4, "divergence": 0.2},
        }
    ).double()
    torch.nn.init.normal_(model.unroll.halt.weight)
    counts, hidden_NBLD = targets != -100, []
    handle = model.decoder.final_norm.register_forward_hook(
        lambda module, given, out: hidden_NBLD.append(out.squeeze(2))
    )
    model(ids)
    handle.remove()
    going_on, expected = torch.ones(counts.sum()), 0.0
    for number, hidden_BLD in enumerate(hidden_NBLD):
        last = number == 2
        hidden = hidden_BLD[counts]
        halts = 1.0 if last else model.unroll.halt(hidden).squeeze(-1).sigmoid()
        share, prior = going_on * halts, 0.6**number * (1.0 if last else 0.4)
        losses = F.cross_entropy(model.decoder.head(hidden), targets[counts], reduction="none")
        expected = expected + (share * losses + 0.2 * share * (share / prior).log()).mean()
        going_on = going_on * (1 - halts)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    objective = model(ids, targets=targets, draw=DRAW).objective
    torch.testing.assert_close(objective, expected, check_dtype=False)
    found = torch.autograd.grad(objective, list(model.parameters()))
    torch.testing.assert_close(found, gradients, atol=1e-6, rtol=1e-5)


def test_evaluation_knows_the_loss_alone(batch):
    ids, targets = batch
    output = model_of()(ids, targets=targets)
    assert output.auxiliary_sum is None
    assert output.objective == output.loss


def test_it_conforms_and_what_it_costs_is_counted():
    assert_conforms({"kind": "test_supervised"})
    assert_conforms({"kind": "test_halting"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"also_predict": [(torch.zeros(2, 9), 1.0)]},
            r"also_predict holds a tensor of shape \(2, 9\); must",
        ),
        ({"penalty_BL": torch.zeros(9)}, r"penalty_BL holds a tensor of shape \(9,\); must be \(2, 9\)"),
        ({"telemetry": {"auxiliary_loss": 1.0}}, "telemetry 'auxiliary_loss': .* choose another name"),
        (
            {"also_predict": [(torch.zeros(2, 9, 16), torch.ones(9))]},
            r"a weight of also_predict holds a tensor of shape \(9,\); must be \(2, 9\)",
        ),
        ({"hidden_BLD": torch.zeros(2, 9, 1, 16)}, r"hidden_BLD holds a tensor of shape \(2, 9, 1, 16\)"),
    ],
)
def test_what_does_not_fit_is_named(batch, change, message):
    model, (ids, targets) = model_of(), batch
    right = model.unroll
    model.unroll = lambda *inputs, **named: dataclasses.replace(right(*inputs, **named), **change)
    with pytest.raises(ValueError, match=f"recurrence 'test_supervised': {message}"):
        model(ids, targets=targets, draw=DRAW)


def with_weight(model, weight):
    right = model.unroll

    def unroll(*inputs, **named):
        unrolled = right(*inputs, **named)
        return dataclasses.replace(unrolled, also_predict=[(unrolled.hidden_BLD, weight)], penalty_BL=None)

    model.unroll = unroll
    return model


def test_tokens_may_be_chosen_by_booleans_and_what_does_not_count_may_be_no_number(batch):
    ids, targets = batch
    chosen = ids % 2 == 0
    expected = with_weight(model_of(), chosen.double())(ids, targets=targets, draw=DRAW).objective
    assert with_weight(model_of(), chosen)(ids, targets=targets, draw=DRAW).objective == expected
    weights = chosen.double().masked_fill(targets == -100, float("nan"))
    assert with_weight(model_of(), weights)(ids, targets=targets, draw=DRAW).objective == expected
    with pytest.raises(TypeError, match="a weight of also_predict is a list; must be a number or a tensor"):
        with_weight(model_of(), [1.0])(ids, targets=targets, draw=DRAW)


def test_what_is_no_unrolled_is_named(batch):
    model, (ids, targets) = model_of(), batch
    right = model.unroll
    model.unroll = lambda *inputs, **named: right(*inputs, **named).hidden_BLD
    with pytest.raises(ValueError, match="recurrence 'test_supervised': returns a Tensor; must be a lattice"):
        model(ids, targets=targets, draw=DRAW)
