"""The thoughts' solvers against the definition written out: gradients, costs, and when they stop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lattice
from lattice.decoder import AttentionMask
from lattice.testing.counted import slots_of

VOCABULARY = 23
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
FEEDBACKS = {
    "hidden": {},
    "softmax": {"feedback": "softmax"},
    "top_k": {"feedback": "softmax", "top_k": 5},
}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))
both_solvers = pytest.mark.parametrize("solver", ["jacobi", "gauss_seidel"])
all_feedbacks = pytest.mark.parametrize("feedback", list(FEEDBACKS))


def tiny(backbone, solver, thoughts, count, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    recurrence = {
        "kind": "latent_thoughts",
        "thoughts": thoughts,
        "solver": solver,
        solver: {"eval": count},
        **options,
    }
    tables = {"backbone": {**BACKBONES[backbone], **sizes, "max_position_embeddings": 64}}
    model = lattice.build_model({**tables, "recurrence": recurrence}).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def thought_of(model, hidden):
    """The feedback, written out."""
    options = model.recurrence
    if options.feedback == "hidden":
        return hidden
    logits = model.decoder.head(hidden)
    if options.top_k:
        least = logits.topk(options.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.softmax(-1) @ (model.decoder.embedding.weight * math.sqrt(16))


def by_definition(model, ids):
    """Slot after slot, everything computed anew for each: logits (B, L, V), with gradients."""
    options, decoder = model.recurrence, model.decoder
    scale = math.sqrt(16 if options.feedback == "softmax" else 2.5 * 16)
    slots, positions, logits = [], [], []
    for at in range(ids.shape[1]):
        following = decoder.embedding(ids[:, at]) * scale
        for _ in range(options.thoughts + 1):
            slots.append(following)
            positions.append(at)
            hidden = torch.stack(slots, dim=1).unsqueeze(2)
            rotary = decoder.rotary(torch.tensor([positions]), torch.float64)
            for block in decoder.blocks:
                hidden = block(hidden, rotary, AttentionMask(causal=True), None)
            last = decoder.final_norm(hidden)[:, -1, 0]
            following = thought_of(model, last)
        logits.append(decoder.head(last))
    return torch.stack(logits, dim=1)


def gradients(model, logits, ids):
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    return torch.autograd.grad(loss, list(model.parameters()))


@both_backbones
@both_solvers
@all_feedbacks
@settings(max_examples=4, deadline=None)
@given(length=st.integers(1, 5), thoughts=st.integers(0, 3), seed=st.integers(0, 99))
def test_fixed_point_and_gradients_are_those_of_the_definition(
    backbone, solver, feedback, length, thoughts, seed
):
    """The fixed point to 1e-10 and every gradient of it, by autograd through the definition."""
    model = tiny(backbone, solver, thoughts, thoughts * (length - 1), **FEEDBACKS[feedback])
    ids = some_ids(2, length, seed)
    expected = by_definition(model, ids)
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    with torch.no_grad():  # the same without autograd, where the cache is a buffer written in place
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-10, rtol=0)
    for ours, theirs in zip(gradients(model, logits, ids), gradients(model, expected, ids), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-7)


@both_backbones
@both_solvers
@pytest.mark.parametrize("checkpointing", ["block", "pass"])
def test_gradients_under_recomputation(backbone, solver, checkpointing):
    """Away from the fixed point, where stale keys matter."""
    ids, found = some_ids(2, 6), []
    for kind in ("none", checkpointing):
        model = tiny(backbone, solver, 2, 2)
        model.checkpointing = lattice.registry.lookup("activation_checkpoint", kind)()
        found.append(gradients(model, model(ids).logits, ids))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-13, rtol=1e-10)


def jacobi_cut_by_hand(model, ids, thoughts, count, last):
    """The paper's iteration with everything before the `last` passes a constant."""
    stack = model._stack(lattice.slots.Tokens.of(ids))
    tokens = stack.embed(ids)[:, :, None] * math.sqrt(2.5 * 16)
    total, slots = thoughts + count + 1, tokens
    for index in range(total):
        hidden = stack.run(slots)
        if index < total - last:
            hidden = hidden.detach()
        refreshed = hidden if index < thoughts else hidden[:, :, :-1]
        slots = torch.cat([tokens, refreshed], dim=2)
    return stack.logits(hidden[:, :, -1])


@both_backbones
@pytest.mark.parametrize("last", [1, 2, 4, 9])
def test_grad_passes_cut_the_graph_of_jacobi(backbone, last):
    ids, model = some_ids(2, 5), tiny(backbone, "jacobi", 2, 2, grad_passes=last)
    expected = jacobi_cut_by_hand(model, ids, 2, 2, last)
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(gradients(model, logits, ids), gradients(model, expected, ids), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


@both_backbones
def test_grad_passes_cut_the_graph_of_gauss_seidel(backbone):
    """All sweeps: the whole gradient. Fewer: less and less of it, the value unchanged."""
    ids = some_ids(2, 5)
    found = {}
    for last in (None, 4, 3, 2, 1):
        model = tiny(backbone, "gauss_seidel", 2, 3, **({"grad_passes": last} if last else {}))
        logits = model(ids).logits
        found[last] = logits, torch.cat([g.flatten() for g in gradients(model, logits, ids)])
    whole = found[None][1]
    for last, (logits, gradient) in found.items():
        torch.testing.assert_close(logits, found[None][0], atol=1e-12, rtol=0)
        if last == 4:
            torch.testing.assert_close(gradient, whole)
    errors = [(found[last][1] - whole).norm() / whole.norm() for last in (4, 3, 2, 1)]
    assert errors == sorted(errors)
    assert 1e-6 < errors[-1] < 1


@pytest.mark.parametrize(
    ("solver", "thoughts", "count", "passes"),
    [
        ("jacobi", 1, 3, 9),
        ("jacobi", 2, 3, 15),
        ("jacobi", 3, 3, 22),
        ("jacobi", 3, 6, 34),
        ("gauss_seidel", 1, 3, 8),
        ("gauss_seidel", 2, 2, 9),
        ("gauss_seidel", 2, 3, 12),
        ("gauss_seidel", 3, 2, 12),
        ("gauss_seidel", 3, 5, 24),
        ("gauss_seidel", 0, 3, 1),
    ],
)
def test_costs(solver, thoughts, count, passes):
    """Method page: K(K+1)/2 + (J+1)(K+1) against (K+1)(n+1), declared and counted."""
    model, counted = tiny("llama", solver, thoughts, count), []
    model.decoder.blocks[0].register_forward_pre_hook(lambda m, args: counted.append(slots_of(args) / 4))
    model(some_ids(1, 4))
    assert model.recurrence.token_passes(model.shape, training=False) == passes == sum(counted)


@both_backbones
@pytest.mark.parametrize("thoughts", [2, 3])
def test_gauss_seidel_is_closer_for_its_cost(backbone, thoughts):
    """Chains: fewer token-passes than three Jacobi refinements, and nearer to the definition."""
    ids = some_ids(4, 24)
    with torch.no_grad():
        exact = by_definition(tiny(backbone, "jacobi", thoughts, 0), ids)
        paper, sweeps = tiny(backbone, "jacobi", thoughts, 3), tiny(backbone, "gauss_seidel", thoughts, 3)
        errors = [(model(ids).logits - exact).norm() / exact.norm() for model in (paper, sweeps)]
    costs = [model.recurrence.token_passes(model.shape, training=False) for model in (paper, sweeps)]
    assert costs[1] < costs[0]
    assert errors[1] < errors[0]


@both_backbones
@both_solvers
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-8])
def test_tolerance_stops_each_row_where_it_stops_alone(backbone, solver, tolerance):
    lengths = [9, 3, 6, 1]
    ids = some_ids(4, 9)
    mask = torch.tensor([[0] * (9 - length) + [1] * length for length in lengths])
    model = tiny(backbone, solver, 2, 100, tolerance=tolerance)
    batched = model(ids, attention_mask=mask)
    logits, cache = model.prefill(ids, mask, parallel=True)
    following = model.step(ids[:, :1], cache)
    counts = []
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, 9 - length :]
        output = model(alone)
        counts.append(len(output.telemetry["residuals"]))
        assert counts[-1] <= 2 * (length - 1) + 1  # one more than it takes to settle: no change is seen
        assert output.telemetry["residuals"][-1] <= tolerance
        torch.testing.assert_close(output.logits[0], batched.logits[row, 9 - length :], atol=1e-10, rtol=0)
        its_logits, its_cache = model.prefill(alone, parallel=True)
        torch.testing.assert_close(its_logits[0], logits[row], atol=1e-10, rtol=0)
        torch.testing.assert_close(
            model.step(ids[row : row + 1, :1], its_cache)[0], following[row], atol=1e-10, rtol=0
        )
    assert len(batched.telemetry["residuals"]) == max(counts)
    assert len(set(counts)) > 1  # so rows did stop at different times
    error = (model(ids).logits - by_definition(model, ids)).norm()
    assert error < 30 * tolerance * by_definition(model, ids).norm()


@both_solvers
def test_tolerance_is_not_for_training(solver):
    """A step's cost is its draw's, on every rank."""
    model = tiny("llama", solver, 1, 50, tolerance=0.5)
    for step in range(8):
        draw = lattice.draws.Draw(0, step)
        residuals = model(some_ids(2, 6), draw=draw).telemetry["residuals"]
        assert len(residuals) == model.recurrence.iterations.count(draw)


def test_a_cache_of_another_layout_is_refused():
    model, ids = tiny("llama", "jacobi", 2, 3), some_ids(1, 4)
    _, cache = model.prefill(ids)
    stack = model._stack(lattice.slots.Tokens.of(ids[:, :1], first=4))
    with pytest.raises(ValueError, match=r"another layout.*stage 1"):
        stack.run(torch.zeros(1, 1, 1, 16, dtype=torch.float64), first_stage=1, cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "newton"),
        ({"gauss_seidel": {"eval": -1}}, "eval = -1"),
        ({"gauss_seidel": {"train": [3, 1]}}, r"train = \[3, 1\]"),
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"grad_passes": 0}, "grad_passes = 0"),
        ({"top_k": 3}, "top_k = 3: has no effect"),
        ({"feedback": "softmax", "top_k": 0}, "top_k = 0"),
        ({"feedback": "hiden"}, "hiden"),
        ({"thoughts": -1}, "thoughts = -1"),
        ({"pauses": 1}, "pauses"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(lattice.recipe.RecipeError, match=message):
        lattice.load_recipe({"recurrence": {"kind": "latent_thoughts", **options}})
