"""Recorded passes. There are no CUDA graphs on a CPU: what a graph would do again is called again here, on
the same tensors (benchmarks/gpu.py has the same with graphs)."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import CONTEXT, NONE, both_backbones, some_ids, thinking, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import lattice
from lattice import replay

ROWS = 2
RECURRENCES = {
    "none": NONE,
    "thoughts": thinking(2),
    "own_positions": {"kind": "latent_thoughts", "thoughts": 1, "position_ids": "fresh"},
    "softmax": {"kind": "latent_thoughts", "thoughts": 1, "feedback": "softmax"},
    "pause": {"kind": "pause", "pauses": 1},
    "loop": {"kind": "loop", "loops": 2},
    "ponder": {"kind": "ponder", "steps": 2},
    "hidden_ponder": {"kind": "hidden_ponder", "steps": 1},
    "depth": {"kind": "depth", "prelude": 1, "coda": 0},
    "depth_concat": {"kind": "depth", "prelude": 1, "coda": 0, "inject": "concat", "normalize": False},
}


class Recordings:
    """In place of CUDA graphs: what they would compute, and how many there are."""

    def __init__(self):
        self.made, self.replayed = 0, 0

    def record(self, compute, aside):
        self.made += 1
        out = compute()

        def replay_it():
            self.replayed += 1
            out.copy_(compute())

        return replay_it, out


@contextmanager
def recorded():
    recordings = Recordings()
    on = mock.patch.object(replay, "recording_on", return_value=True)
    record = mock.patch.object(replay, "record", recordings.record)
    with on, record, mock.patch.object(replay, "memory"):
        yield recordings


def logits_of(model, ids, present=None, documents=None):
    """Of every token, one after the other."""
    cache, found = model.cache(), []
    for at in range(ids.shape[1]):
        given = (None if one is None else one[:, at : at + 1] for one in (present, documents))
        found.append(model.step(ids[:, at : at + 1], cache, *given))
    return torch.stack(found, 1)


@both_backbones
@pytest.mark.parametrize("recurrence", list(RECURRENCES))
@pytest.mark.parametrize("padded", [False, True])
def test_a_recorded_pass_computes_the_same(backbone, recurrence, padded):
    model, ids = tiny(backbone, RECURRENCES[recurrence]), some_ids(3, 70)
    present = torch.arange(70) >= torch.tensor([[0], [9], [30]]) if padded else None
    expected = logits_of(model, ids, present)
    with recorded() as recordings:
        torch.testing.assert_close(logits_of(model, ids, present), expected, atol=1e-10, rtol=0)
    assert recordings.made >= 2  # the buffers have grown
    assert recordings.replayed > 50


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(1, 40),
    new_tokens=st.integers(1, CONTEXT - 40),
    rows=st.integers(1, 3),
    thoughts=st.integers(0, 3),
    seen=st.sampled_from(["all", "own", "last"]),
    window=st.one_of(st.none(), st.integers(1, 20)),
    parallel=st.booleans(),
)
def test_so_does_decoding_under_any_mask(prompt, new_tokens, rows, thoughts, seen, window, parallel):
    mask = {"kind": "causal", "thoughts": seen, **({"window": window} if window else {})}
    model, ids = tiny("llama", thinking(thoughts), mask=mask), some_ids(rows, prompt, seed=prompt)
    expected = lattice.generate(model, ids, new_tokens, parallel_prefill=parallel)
    with recorded() as recordings:
        assert torch.equal(lattice.generate(model, ids, new_tokens, parallel_prefill=parallel), expected)
    passes = (new_tokens - 1) * (thoughts + 1)
    assert passes <= replay.AFTER or recordings.replayed


def test_documents_are_kept_apart():
    model, ids = tiny("gpt_neox", thinking(1), mask={"kind": "document"}), some_ids(2, 40)
    documents = torch.arange(40)[None] // torch.tensor([[13], [40]])
    expected = logits_of(model, ids, documents=documents)
    with recorded():
        torch.testing.assert_close(logits_of(model, ids, documents=documents), expected, atol=1e-10, rtol=0)


class Casts(TorchDispatchMode):
    """How many weights of linears are cast."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += (
            function is torch.ops.aten._to_copy.default and args[0].dim() == 2 and len(args[0]) > ROWS
        )
        return function(*args, **(kwargs or {}))


@both_backbones
def test_weights_are_cast_once_for_all_passes_as_autocast_casts_them(backbone):
    model, ids = tiny(backbone, thinking(1)).float(), some_ids(ROWS, 60)
    linears = sum(weight.dim() == 2 for block in model.decoder.blocks for weight in block.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model, ids)
    with recorded() as recordings, torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        found = logits_of(model, ids)
    assert recordings.made == 2
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
    # By autocast for the passes before, once for all that are recorded, and the head.
    assert casts.count == 2 * linears + 1


def test_a_copy_of_a_cache_goes_on_by_itself():
    model, ids = tiny("llama", thinking(1)), some_ids(1, 40)
    expected = logits_of(model, ids)
    with recorded() as recordings:
        cache = model.cache()
        for at in range(20):
            model.step(ids[:, at : at + 1], cache)
        cache.replays._aside = (token for token in ())  # as little to be copied as a CUDA graph
        copied, made = copy.deepcopy(cache), recordings.made
        for at in range(20, 40):
            model.step(some_ids(1, 1), cache)
            logits = model.step(ids[:, at : at + 1], copied)
    assert (made, recordings.made) == (1, 4)  # each of its own, and again when its buffers have grown
    torch.testing.assert_close(logits, expected[:, -1], atol=1e-10, rtol=0)


def test_a_hook_sees_every_pass():
    model, seen = tiny("llama", thinking(1)), []
    cache, ids = model.cache(), some_ids(1, 30)
    with recorded() as recordings:
        for at in range(30):
            if at == 20:
                assert recordings.replayed
                model.decoder.blocks[1].mlp.register_forward_hook(lambda *_: seen.append(1))
            model.step(ids[:, at : at + 1], cache)
    assert len(seen) == 10 * 2


def test_a_layer_with_a_forward_of_its_own_is_called_as_it_is_written():
    model, ids = tiny("llama"), some_ids(1, 30)
    block = model.decoder.blocks[0]
    kind = type(block)
    block.__class__ = type("Own", (kind,), {"forward": lambda self, *inputs: kind.forward(self, *inputs)})
    with recorded() as recordings:
        logits_of(model, ids)
    assert not recordings.made


def test_what_cannot_be_recorded_is_said_and_computed_all_the_same():
    model, ids = tiny("gpt_neox", thinking(1)), some_ids(2, 30)
    expected = logits_of(model, ids)

    def refuses(compute, aside):
        compute()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nsearch for it")

    said = pytest.warns(UserWarning, match="without CUDA graphs, slower: CUDA error: operation not permitted")
    with recorded(), mock.patch.object(replay, "record", refuses), said as warned:
        found = logits_of(model, ids)
    assert len(warned) == 1
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
