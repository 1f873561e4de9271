"""Latent thoughts: the parallel solver against the sequential definition, draws, costs, initial weights."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lattice
from lattice.cache import KVCache
from lattice.components.recurrence.latent_thoughts import Jacobi, LatentThoughts
from lattice.draws import Draw
from lattice.protocols import Shape
from lattice.slots import Tokens
from lattice.stack import Stack
from lattice.testing.counted import slots_of

VOCABULARY = 29
SHAPE = Shape(hidden_size=16, num_layers=2, vocab_size=VOCABULARY, context=32, splits=2)
BACKBONES = {
    "gpt_neox": {
        "kind": "gpt_neox",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "rotary_pct": 0.5,
    },
    "llama": {
        "kind": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    },
}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))


def tiny(backbone, recurrence, dtype=torch.float64, **tables):
    """A model whose every parameter is far from its initial value, norms and biases included."""
    options = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **BACKBONES[backbone]}
    model = lattice.build_model({"backbone": options, "recurrence": recurrence, **tables}).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def thinking(thoughts, eval_count, **options):
    return {"kind": "latent_thoughts", "thoughts": thoughts, "jacobi": {"eval": eval_count}, **options}


def some_ids(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padding(lengths):
    longest = max(lengths)
    return torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])


def sequential_logits(model, ids, mask=None):
    """The definition: one token after the other through the cache, (B, L, V)."""
    cache = KVCache(model.shape.num_layers)
    columns = []
    for at in range(ids.shape[1]):
        present = None if mask is None else mask[:, at : at + 1]
        columns.append(model.step(ids[:, at : at + 1], cache, present))
    return torch.stack(columns, dim=1)


@both_backbones
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    thoughts=st.integers(0, 3),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_enough_iterations_give_the_sequential_definition(backbone, lengths, thoughts, padded, seed):
    longest = max(lengths)
    model = tiny(backbone, thinking(thoughts, thoughts * (longest - 1)))
    ids = some_ids(len(lengths), longest, seed)
    mask = left_padding(lengths) if padded else None
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

    parallel = model(ids, attention_mask=mask).logits
    sequential = sequential_logits(model, ids, mask)
    torch.testing.assert_close(parallel[real], sequential[real], atol=1e-10, rtol=1e-10)
    assert torch.isfinite(parallel).all()
    assert torch.isfinite(sequential).all()

    for end in range(1, longest + 1):  # a prefill is the steps of its prompt; prefixes agree with the whole
        prefix_mask = None if mask is None else mask[:, :end]
        logits, cache = model.prefill(ids[:, :end], prefix_mask)
        there = real[:, end - 1]
        torch.testing.assert_close(logits[there], parallel[there, end - 1], atol=1e-10, rtol=1e-10)
        assert cache.tokens == end
        assert len(cache.slots.stage_S) == end * (thoughts + 1)

    if padded:  # each row is what it is alone
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, longest - length :]).logits[0]
            torch.testing.assert_close(parallel[row, longest - length :], alone, atol=1e-10, rtol=1e-10)


@both_backbones
@pytest.mark.parametrize("thoughts", [1, 2, 3])
def test_fewer_iterations_do_not(backbone, thoughts):
    """So the test above would notice a solver that converged, or cheated, too early."""
    ids = some_ids(2, 5)
    sequential = sequential_logits(tiny(backbone, thinking(thoughts, 0)), ids)
    errors = [
        (tiny(backbone, thinking(thoughts, count))(ids).logits - sequential).abs().amax(dim=(0, 2))
        for count in range(4 * thoughts + 1)
    ]
    assert errors[0].max() > 1e-3
    assert errors[thoughts].max() < errors[0].max()
    for count, error in enumerate(errors):
        exact = 1 + count // thoughts  # each K iterations settle one more token
        assert error[:exact].max() < 1e-10, count
    assert errors[-2].max() > 1e-10


@both_backbones
@pytest.mark.parametrize("thoughts", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_residuals(backbone, thoughts, count):
    model = tiny(backbone, thinking(thoughts, count))
    telemetry = model(some_ids(2, 6)).telemetry
    if not count:
        assert telemetry == {}
        return
    residuals = telemetry["residuals"]
    assert residuals.shape == (count,)
    assert not residuals.requires_grad
    assert residuals[0] > 0
    if count > 1:
        assert residuals[-1] < residuals[0]


@both_backbones
def test_residuals_are_the_relative_change_of_the_thoughts(backbone):
    """Of one thought of two tokens, from the hidden states themselves; rows have their mean."""
    ids = some_ids(3, 2)
    model = tiny(backbone, thinking(1, 4))
    seen = []
    model.decoder.final_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    residuals = model(ids).telemetry["residuals"]
    thoughts = seen[:-1]
    expected = [
        torch.stack([(b - a).norm() / b.norm() for a, b in zip(before, after, strict=True)]).mean()
        for before, after in pairwise(thoughts)
    ]
    torch.testing.assert_close(residuals.double(), torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert residuals[-1] < 1e-6  # solved after one iteration, K(L-1)


@both_backbones
def test_telemetry_does_not_change_the_gradients_path(backbone):
    model = tiny(backbone, thinking(1, 2))
    output = model(some_ids(2, 4), targets=some_ids(2, 4, seed=1))
    output.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not output.telemetry["residuals"].requires_grad


@both_backbones
def test_no_thoughts_are_the_plain_model(backbone):
    ids, mask = some_ids(3, 6), left_padding([6, 4, 1])
    plain = tiny(backbone, {"kind": "none"})
    for scale in (1.0, 3.0):
        empty = tiny(backbone, thinking(0, 3, embed_scale=scale))
        empty.load_state_dict(plain.state_dict())
        with torch.no_grad():
            empty.decoder.embedding.weight /= scale
        output = empty(ids, attention_mask=mask)
        torch.testing.assert_close(output.logits, plain(ids, attention_mask=mask).logits, atol=1e-12, rtol=0)
        assert output.telemetry == {}
    assert empty.recurrence.token_passes(SHAPE, training=True) == 1
    assert empty.recurrence.parallel_is_exact


@both_backbones
def test_fresh_positions_are_those_of_the_slots(backbone):
    """Sequential decoding is then that of a plain model whose inputs are the slots, one after the other."""
    model = tiny(backbone, thinking(2, 1, position_ids="fresh"))
    ids = some_ids(2, 5)
    cache, plain = model.cache(), KVCache(model.shape.num_layers)
    decoder, scale = model.decoder, model.unroll.scale
    for at in range(ids.shape[1]):
        logits = model.step(ids[:, at : at + 1], cache)
        slot_B11D = (decoder.embedding(ids[:, at : at + 1]) * scale).unsqueeze(2)
        for slot in range(3 * at, 3 * at + 3):
            tokens = Tokens.of(ids[:, :1], first=slot)
            slot_B11D = Stack(decoder, model.mask, model.checkpointing, tokens).run(slot_B11D, cache=plain)
        torch.testing.assert_close(logits, decoder.head(slot_B11D[:, 0, 0]))


def test_default_scale():
    model = tiny("llama", thinking(1, 1))
    spelled = tiny("llama", thinking(1, 1, embed_scale=math.sqrt(2.5 * 16)))
    assert torch.equal(model(some_ids(1, 3)).logits, spelled(some_ids(1, 3)).logits)


@pytest.mark.parametrize(("thoughts", "passes"), [(0, 1), (1, 9), (2, 15), (3, 22)])
def test_token_passes(thoughts, passes):
    recurrence = LatentThoughts(thoughts=thoughts)
    assert recurrence.token_passes(SHAPE, training=False) == passes
    assert recurrence.token_passes(SHAPE, training=True) == pytest.approx(passes)  # the mean of 2..4 is 3
    assert recurrence.slots == thoughts + 1
    assert recurrence.parallel_is_exact == (thoughts == 0)


def counted_passes(model, ids, draw=None):
    """Number of passes, and slots a token sent through the first layer."""
    sizes = []
    handle = model.decoder.blocks[0].register_forward_pre_hook(
        lambda module, args: sizes.append(slots_of(args) / ids.shape[1])
    )
    model(ids, draw=draw)
    handle.remove()
    return len(sizes), sum(sizes)


@both_backbones
@pytest.mark.parametrize("thoughts", [0, 1, 2, 3])
def test_as_many_passes_as_drawn(backbone, thoughts):
    recurrence = {"kind": "latent_thoughts", "thoughts": thoughts, "jacobi": {"train": [1, 4], "eval": 2}}
    model = tiny(backbone, recurrence)
    ids, seen = some_ids(2, 3), set()
    for step in range(24):
        draw = Draw(seed=3, step=step)
        count = model.recurrence.jacobi.count(draw)
        passes, slots = counted_passes(model, ids, draw)
        if thoughts:
            assert passes == thoughts + count + 1
            assert slots == thoughts * (thoughts + 1) / 2 + (count + 1) * (thoughts + 1)
            assert len(model(ids, draw=draw).telemetry["residuals"]) == count
        else:
            assert (passes, slots) == (1, 1)
        seen.add(passes)
    assert len(seen) == (4 if thoughts else 1)
    assert counted_passes(model, ids)[1] == model.recurrence.token_passes(SHAPE, training=False)


@settings(max_examples=50, deadline=None)
@given(low=st.integers(0, 5), width=st.integers(0, 4), seed=st.integers(0, 2**40))
def test_drawn_counts(low, width, seed):
    jacobi = Jacobi(train=(low, low + width))
    counts = [jacobi.count(Draw(seed, step)) for step in range(100)]
    assert set(counts) == set(range(low, low + width + 1))
    torch.manual_seed(0)  # neither a global generator nor an earlier draw has a part in it
    assert [jacobi.count(Draw(seed, step)) for step in reversed(range(100))] == counts[::-1]
    if width:
        assert counts != [jacobi.count(Draw(seed + 1, step)) for step in range(100)]
        assert max(Counter(counts).values()) < 85


def test_drawn_counts_are_about_uniform():
    counts = Counter(Jacobi().count(Draw(0, step)) for step in range(3000))
    assert set(counts) == {2, 3, 4}
    assert all(abs(count - 1000) < 130 for count in counts.values())  # five standard deviations


@both_backbones
def test_forward_is_a_function_of_its_inputs_in_training_mode(backbone):
    model, ids = tiny(backbone, thinking(2, 2)), some_ids(2, 4)
    trained, again = model.train()(ids).logits, model(ids).logits
    evaluated = model.eval()(ids).logits
    assert torch.equal(trained, again)
    assert torch.equal(trained, evaluated)


@both_backbones
@pytest.mark.parametrize("thoughts", [1, 3])
def test_initial_weights(backbone, thoughts):
    size, layers = 64, 3
    options = {
        **BACKBONES[backbone],
        "hidden_size": size,
        "num_hidden_layers": layers,
        "intermediate_size": 128,
        "vocab_size": 500,
        "attention_bias": True,
    }
    model = lattice.build_model({"backbone": options, "recurrence": thinking(thoughts, 3)})
    std = math.sqrt(2 / (5 * size))
    residual_std = std / math.sqrt(2 * layers * (thoughts + 1))
    ends = ("attention.dense.weight", "dense_4h_to_h.weight", "o_proj.weight", "down_proj.weight")
    residuals = 0
    for name, parameter in model.decoder.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = residual_std if name.endswith(ends) else std
            residuals += name.endswith(ends)
            assert parameter.abs().max() <= 3 * expected, name
            assert parameter.abs().max() > 2.5 * expected, name
            # Cutting at three standard deviations leaves 0.9866 of the standard deviation.
            assert parameter.std().item() == pytest.approx(0.9866 * expected, rel=0.05), name
            assert abs(parameter.mean()) < 5 * expected / math.sqrt(parameter.numel()), name
    assert residuals == 2 * layers


def test_initial_weights_depend_on_the_seed_alone():
    tables = {"backbone": {**BACKBONES["llama"], "vocab_size": 20}, "recurrence": thinking(1, 1)}
    torch.manual_seed(1)
    first = lattice.build_model(tables).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = lattice.build_model(tables).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = lattice.build_model({**tables, "run": {"seed": 1}}).state_dict()
    assert not torch.equal(first["decoder.lm_head.weight"], third["decoder.lm_head.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thoughts": -1}, r"recurrence\.thoughts = -1: must be at least 0"),
        ({"thoughts": 1.5}, r"recurrence\.thoughts"),
        ({"embed_scale": 0}, r"recurrence\.embed_scale = 0(\.0)?: must be greater than 0"),
        ({"jacobi": {"train": [3, 2]}}, r"recurrence\.jacobi\.train = \[3, 2\]: must be a range"),
        ({"jacobi": {"train": [-1, 2]}}, r"recurrence\.jacobi\.train = \[-1, 2\]: must be a range"),
        ({"jacobi": {"train": [1, 2, 3]}}, r"recurrence\.jacobi\.train"),
        ({"jacobi": {"eval": -1}}, r"recurrence\.jacobi\.eval = -1: must be at least 0"),
        ({"jacobi": {"evals": 1}}, r"recurrence\.jacobi\.evals: unknown option.*eval"),
        ({"thougths": 1}, r"recurrence\.thougths: unknown option.*thoughts"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(lattice.RecipeError, match=message):
        lattice.load_recipe({"recurrence": {"kind": "latent_thoughts", **options}})
