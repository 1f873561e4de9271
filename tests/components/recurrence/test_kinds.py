"""The recurrence family on both backbones: definitions spelled out, decoding, padding, costs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lattice
from lattice.cache import KVCache
from lattice.draws import Draw
from lattice.slots import Tokens
from lattice.testing.counted import slots_of

VOCABULARY = 23
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
KINDS = {
    "none": {"kind": "none"},
    "pause": {"kind": "pause", "pauses": 2},
    "loop": {"kind": "loop", "loops": 2},
    "ponder": {"kind": "ponder", "steps": 2},
    "ponder_top_k": {"kind": "ponder", "steps": 2, "top_k": 5, "accumulate": False},
    "hidden_ponder": {"kind": "hidden_ponder", "steps": 2},
    "depth": {"kind": "depth", "repetitions": {"eval": 3}},
    "depth_concat": {"kind": "depth", "inject": "concat", "normalize": False, "prelude": 0, "coda": 2},
    "depth_exit": {"kind": "depth", "repetitions": {"eval": 40}, "tolerance": 0.03},
    "softmax": {"kind": "latent_thoughts", "thoughts": 2, "feedback": "softmax", "jacobi": {"eval": 20}},
    "softmax_top_k": {
        "kind": "latent_thoughts",
        "thoughts": 1,
        "feedback": "softmax",
        "top_k": 5,
        "jacobi": {"eval": 10},
    },
    "gauss_seidel": {
        "kind": "latent_thoughts",
        "thoughts": 2,
        "solver": "gauss_seidel",
        "gauss_seidel": {"eval": 12},
    },
}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))
all_kinds = pytest.mark.parametrize("kind", list(KINDS))
# With a tolerance depth leaves the loop for all tokens of a row at once in parallel, for each in sequence.
exact_kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "depth_exit"])


def tiny(backbone, recurrence, **tables):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    options = {**BACKBONES[backbone], **sizes, "max_position_embeddings": 32}
    model = lattice.build_model({"backbone": options, "recurrence": recurrence, **tables}).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows, length, seed=0):
    # the last row of the table is the pause
    return torch.randint(VOCABULARY - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def stepwise(model, ids, mask=None):
    cache = KVCache(model.shape.num_layers)
    columns = [
        model.step(ids[:, at : at + 1], cache, None if mask is None else mask[:, at : at + 1])
        for at in range(ids.shape[1])
    ]
    return torch.stack(columns, dim=1)


@both_backbones
@exact_kinds
def test_parallel_is_stepwise(backbone, kind):
    """Exactly, or for what is solved by iteration: with iterations enough."""
    model, ids = tiny(backbone, KINDS[kind]), some_ids(2, 6)
    torch.testing.assert_close(model(ids).logits, stepwise(model, ids), atol=1e-10, rtol=0)


@both_backbones
@all_kinds
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_a_padded_batch_gives_each_row_what_it_gives_alone(backbone, kind, lengths, seed):
    model, longest = tiny(backbone, KINDS[kind]), max(lengths)
    ids = some_ids(len(lengths), longest, seed)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    batched = lattice.generate(model, ids, 4, attention_mask=mask)
    forward = model(ids, attention_mask=mask).logits
    logits, cache = model.prefill(ids, mask)
    in_parallel, _ = model.prefill(ids, mask, parallel=True)
    following = model.step(ids[:, :1], cache)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, longest - length :]
        assert torch.equal(lattice.generate(model, alone, 4)[0, length:], batched[row, longest:])
        torch.testing.assert_close(
            model(alone).logits[0], forward[row, longest - length :], atol=1e-10, rtol=0
        )
        its_logits, its_cache = model.prefill(alone)
        torch.testing.assert_close(its_logits[0], logits[row], atol=1e-10, rtol=0)
        its_parallel, _ = model.prefill(alone, parallel=True)
        torch.testing.assert_close(its_parallel[0], in_parallel[row], atol=1e-10, rtol=0)
        its_following = model.step(ids[row : row + 1, :1], its_cache)
        torch.testing.assert_close(its_following[0], following[row], atol=1e-10, rtol=0)


@both_backbones
@exact_kinds
def test_decoding_goes_on_from_a_parallel_prefill(backbone, kind):
    model, ids = tiny(backbone, KINDS[kind]), some_ids(2, 6)
    logits, cache = model.prefill(ids[:, :4], parallel=True)
    rest = [logits] + [model.step(ids[:, at : at + 1], cache) for at in (4, 5)]
    torch.testing.assert_close(torch.stack(rest, 1), stepwise(model, ids)[:, 3:], atol=1e-10, rtol=0)


@both_backbones
@all_kinds
def test_costs_are_as_declared(backbone, kind):
    """Slots through layers, counted."""
    model, ids = tiny(backbone, KINDS[kind]), some_ids(2, 6)
    counted = []
    for block in model.decoder.blocks:
        block.register_forward_pre_hook(lambda module, args: counted.append(slots_of(args)))
    model(ids)
    passes = sum(counted) / model.shape.num_layers / ids.shape[1]
    declared = model.recurrence.token_passes(model.shape, training=False)
    assert passes <= declared if kind == "depth_exit" else passes == pytest.approx(declared)
    drawn, means = 0, []
    for step in range(40):
        counted.clear()
        model(ids[:1, :2], draw=Draw(0, step))
        means.append(sum(counted) / model.shape.num_layers / 2)
        drawn += 1
    spread = torch.tensor(means).std().item() / math.sqrt(drawn)
    expected = model.recurrence.token_passes(model.shape, training=True)
    assert abs(sum(means) / drawn - expected) <= 4 * spread + 1e-9


@both_backbones
@all_kinds
@pytest.mark.parametrize("checkpointing", ["block", "pass"])
def test_recomputation_does_not_change_the_gradients(backbone, kind, checkpointing):
    ids, gradients = some_ids(2, 6), []
    for choice in ("none", checkpointing):
        model = tiny(backbone, KINDS[kind], activation_checkpoint={"kind": choice})
        model(ids, targets=ids.roll(-1, 1), draw=Draw(1, 1)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-9)
        if "bias" not in name:  # those of keys cancel in the softmax
            assert gradient.abs().max() > 0, name


@both_backbones
@pytest.mark.parametrize(
    "recurrence",
    [
        {"kind": "loop", "loops": 0, "embed_scale": 1.0},
        {"kind": "pause", "pauses": 0, "embed_scale": 1.0},
        {"kind": "ponder", "steps": 0, "embed_scale": 1.0},
        {"kind": "hidden_ponder", "steps": 0},
        {"kind": "depth", "repetitions": {"eval": 1}, "normalize": False, "embed_scale": 1.0},
        {
            "kind": "depth",
            "repetitions": {"eval": 1},
            "normalize": False,
            "inject": "concat",
            "embed_scale": 1.0,
        },
        {"kind": "latent_thoughts", "thoughts": 0, "solver": "gauss_seidel", "embed_scale": 1.0},
    ],
    ids=lambda table: table["kind"],
)
def test_without_extra_steps_every_kind_is_the_plain_model(backbone, recurrence):
    ids, plain, extended = some_ids(2, 5), tiny(backbone, {"kind": "none"}), tiny(backbone, recurrence)
    own = {name: value for name, value in extended.state_dict().items() if "unroll" in name}
    if own:  # its own map begins as the sum
        size = plain.shape.hidden_size
        own = {name: torch.eye(size, dtype=torch.float64).repeat(1, 2) for name in own}
    extended.load_state_dict(plain.state_dict() | own)
    torch.testing.assert_close(extended(ids).logits, plain(ids).logits, atol=1e-12, rtol=0)


@both_backbones
@pytest.mark.parametrize("normalize", [True, False])
def test_depth_by_its_definition(backbone, normalize):
    recurrence = {
        "kind": "depth",
        "prelude": 1,
        "coda": 2,
        "repetitions": {"eval": 3},
        "normalize": normalize,
    }
    model, ids = tiny(backbone, recurrence), some_ids(2, 5)
    stack, blocks = model._stack(Tokens.of(ids)), model.decoder.blocks
    rotary = model.decoder.rotary(torch.arange(5)[None], torch.float64)
    mask = stack._attention_mask(stack.segment(1), None)
    embedded = model.decoder.embedding(ids).unsqueeze(2) * math.sqrt(2.5 * 16)
    prelude = blocks[0](embedded, rotary, mask, None)
    state = torch.zeros_like(prelude)
    for _ in range(3):
        state = blocks[1](state + prelude, rotary, mask, None)
        state = model.decoder.final_norm(state) if normalize else state
    hidden = model.decoder.final_norm(blocks[3](blocks[2](state, rotary, mask, None), rotary, mask, None))
    torch.testing.assert_close(model(ids).logits, model.decoder.head(hidden).squeeze(2), atol=1e-10, rtol=0)


@both_backbones
def test_depth_exits_when_a_token_has_converged(backbone):
    ids = some_ids(1, 6)
    whole = tiny(backbone, {"kind": "depth", "repetitions": {"eval": 40}})
    early = tiny(backbone, KINDS["depth_exit"])
    counts = []
    for block in early.decoder.blocks[1:2]:
        block.register_forward_pre_hook(lambda module, args: counts.append(1))
    cache, passes, errors = KVCache(4), [], []
    for at in range(6):
        counts.clear()
        logits = early.step(ids[:, at : at + 1], cache)
        passes.append(len(counts))
        errors.append((logits - whole(ids[:, : at + 1]).logits[:, -1]).abs().max().item())
    assert all(1 < count < 40 for count in passes)
    assert all(len(cache.of_pass(index).slots.stage_S) == 6 for index in range(40))
    assert max(errors) < 0.5
    tight = tiny(backbone, {**KINDS["depth_exit"], "tolerance": 1e-12})
    torch.testing.assert_close(stepwise(tight, ids), whole(ids).logits, atol=1e-8, rtol=0)


def test_depth_with_a_tolerance_caches_no_more_than_without():
    """The prelude and the coda run once, and the cache holds what they compute once."""
    numbers = []
    for options in ({}, {"tolerance": 0.5}, {"tolerance": 1e-12}):
        depth = {"kind": "depth", "prelude": 1, "coda": 2, "repetitions": {"train": [2, 2], "eval": 6}}
        model = tiny("llama", depth | options)
        for parallel in (False, True):
            _, cache = model.prefill(some_ids(2, 5), parallel=parallel)
            numbers.append(cache.numbers)
    assert len(set(numbers)) == 1


@both_backbones
@all_kinds
def test_layers_may_be_one_module(backbone, kind):
    """Which is then what layers with the same weights are."""
    alike, shared, ids = tiny(backbone, KINDS[kind]), tiny(backbone, KINDS[kind]), some_ids(2, 5)
    first = shared.decoder.blocks[0]
    for index, block in enumerate(alike.decoder.blocks):
        block.load_state_dict(first.state_dict())
        shared.decoder.blocks[index] = first
    assert len(set(shared.decoder.blocks)) == 1
    torch.testing.assert_close(shared(ids).logits, alike(ids).logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(stepwise(shared, ids), stepwise(alike, ids), atol=1e-12, rtol=0)


@both_backbones
@all_kinds
def test_bf16_is_fp32_to_its_precision(backbone, kind):
    ids = some_ids(2, 6)
    model = tiny(backbone, KINDS[kind]).float()
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(ids, targets=ids.roll(-1, 1), draw=Draw(0, 3))
        losses.append(output.loss)
    assert losses[1].dtype == torch.float32
    assert losses[1].item() != losses[0].item()
    torch.testing.assert_close(losses[1], losses[0], atol=0.1, rtol=0.02)
    losses[1].backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        logits = stepwise(model, ids)
    assert (logits.float() - stepwise(model, ids)).abs().mean() < 0.1  # a top k may choose others
