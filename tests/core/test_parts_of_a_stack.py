"""Passes over some of the tokens, after those in a cache, against one pass over all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lattice
from lattice.cost import Pass
from lattice.draws import Draw
from lattice.slots import Tokens
from lattice.stack import Stack
from lattice.testing import BACKBONES, CHECKS, assert_conforms
from lattice.testing.counted import operations
from tests.carried import Carried

LENGTH = 7


def model_of(backbone="llama", **tables):
    return lattice.build_model({"backbone": BACKBONES[backbone], **tables}).double()


def whole_stack(model, **said):
    ids_BL = torch.zeros(2, LENGTH, dtype=torch.long)
    return Stack(model.decoder, model.mask, model.checkpointing, Tokens.of(ids_BL, **said))


def slots(stages):
    generator = torch.Generator().manual_seed(stages)
    return torch.randn(2, LENGTH, stages, 16, dtype=torch.float64, generator=generator, requires_grad=True)


@settings(deadline=None, max_examples=20)
@given(
    cuts=st.sets(st.integers(1, LENGTH - 1)),
    stages=st.integers(1, 3),
    backbone=st.sampled_from(sorted(BACKBONES)),
    recomputed=st.sampled_from(["none", "block", "pass"]),
    mask=st.sampled_from([{"kind": "causal"}, {"kind": "causal", "thoughts": "own"}, {"kind": "document"}]),
    padded=st.booleans(),
)
def test_values_and_gradients(cuts, stages, backbone, recomputed, mask, padded):
    model = model_of(backbone, mask=mask, activation_checkpoint={"kind": recomputed})
    said = {"documents_BL": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]])}
    if padded:
        said["attention_mask_BL"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    stack, given_BLnD = whole_stack(model, **said), slots(stages)
    expected_BLnD = stack.run(given_BLnD)
    cache, parts = stack.cache(), []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), LENGTH], strict=True):
        at = slice(start, stop)
        parts.append(stack.part(at).run(given_BLnD[:, at], cache=cache))
    found_BLnD = torch.cat(parts, dim=1)
    assert stack.passes == 1 + len(parts)
    wanted = [given_BLnD, *model.decoder.blocks.parameters()]
    real = slice(2, None) if padded else slice(None)  # what padding gives is nobody's business
    torch.testing.assert_close(found_BLnD[:, real], expected_BLnD[:, real])
    weights = torch.randn(expected_BLnD[:, real].shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((weights * found_BLnD[:, real]).sum(), wanted),
        torch.autograd.grad((weights * expected_BLnD[:, real]).sum(), wanted),
    )


@pytest.mark.parametrize("check", CHECKS)
def test_a_state_carried_from_token_to_token(check):
    assert_conforms({"kind": Carried.kind}, check=check)


def test_what_is_carried_by_hand():
    """In training, of two documents in a row: each is what it is alone, and its own mean enters."""
    model = model_of(recurrence={"kind": Carried.kind}, mask={"kind": "document"})
    ids_BL = torch.tensor([[3, 1, 4, 1, 5, 9]])
    logits_BLV = model(ids_BL, documents=torch.tensor([[0, 0, 0, 0, 1, 1]]), draw=Draw(0, 0)).logits
    for document in (slice(0, 4), slice(4, 6)):
        own_BL = ids_BL[:, document]
        inputs_BLD, keep = model.decoder.embedding(own_BL), model.unroll.keep
        mean_BD = torch.zeros_like(inputs_BLD[:, 0])
        for at in range(own_BL.shape[1]):
            inputs_BLD = inputs_BLD.clone()
            inputs_BLD[:, at] += mean_BD
            alone = Stack(model.decoder, model.mask, model.checkpointing, Tokens.of(own_BL[:, : at + 1]))
            hidden_BLD = alone.run(inputs_BLD[:, : at + 1].unsqueeze(2)).squeeze(2)
            mean_BD = keep * mean_BD + (1 - keep) * hidden_BLD[:, -1]
        torch.testing.assert_close(logits_BLV[:, document], model.decoder.head(hidden_BLD))


@pytest.mark.parametrize("part", [1, 2, 3, 7, 9, None])
def test_the_ledger_counts_parts(part):
    model, one = model_of("gpt_neox"), Pass(stages=2, part=part)
    stack, given_BLnD, at = whole_stack(model), slots(2).detach(), part or LENGTH

    def run():
        cache = stack.cache()
        for tokens in (slice(start, start + at) for start in range(0, LENGTH, at)):
            stack.part(tokens).run(given_BLnD[:, tokens], cache=cache)

    cost, layers = model.components["backbone"].layer_cost, model.shape.num_layers
    with torch.no_grad():
        counted = operations(run)
    assert counted == pytest.approx(2 * LENGTH * one.layer_operations(cost, layers, LENGTH), rel=1e-12)
    assert stack.passes == one.runs(LENGTH)


def test_what_a_cache_carries_is_counted():
    model = model_of(recurrence={"kind": Carried.kind})
    _, cache = model.prefill(torch.zeros(2, 3, dtype=torch.long))
    keys_and_values = sum(layer.numbers for layer in cache._layers)
    assert cache.numbers == keys_and_values + cache.state["mean"].numel()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda stack: stack.run(slots(1)[:, :1]),
            r"slots have shape \(2, 1, 1, 16\); must be \(B, 7, n, D\)",
        ),
        (
            lambda stack: stack.run(slots(1)[:, :, 0]),
            r"slots have shape \(2, 7, 16\); must be \(B, 7, n, D\)",
        ),
        (lambda stack: stack.run(stack.fixed(slots(1)[:, :1]), slots(1)), r"shape \(2, 1, 1, 16\); must be"),
        (lambda stack: stack.run(slots(1), start=9), r"start = 9, stop = None: must be .* <= 4"),
        (lambda stack: stack.run(slots(1), stop=9), r"start = 0, stop = 9: must be .* <= 4"),
        (lambda stack: stack.run(slots(1), start=2, stop=1), r"start = 2, stop = 1: must be"),
        (lambda stack: stack.run(slots(1), start=-1), r"start = -1, stop = None: must be"),
        (lambda stack: stack.part(slice(7, 9)), r"slice\(7, 9, None\)\): must be .* at least one of the 7"),
        (lambda stack: stack.part(slice(0, 6, 2)), r"must be consecutive tokens"),
        (lambda stack: stack.part(slice(3, 5)).run(slots(1)), r"must be \(B, 2, n, D\)"),
    ],
)
def test_slots_of_other_tokens_and_layers_that_are_not_there(call, message):
    with pytest.raises(ValueError, match=message):
        call(whole_stack(model_of()))


def test_a_part_needs_what_comes_before_it():
    stack = whole_stack(model_of())
    with pytest.raises(ValueError, match="a cache of another layout: it holds 0 tokens"):
        stack.part(slice(3, 5)).run(slots(1)[:, 3:5], cache=stack.cache())
