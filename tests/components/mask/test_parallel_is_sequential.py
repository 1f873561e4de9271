"""Under every mask, parallel training equals decoding token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_models import both_backbones, masks, some_ids, tiny

from lattice.components.mask.causal import Causal

KINDS = {
    "none": {"kind": "none"},
    "jacobi": {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"eval": 12}},
    "gauss_seidel": {
        "kind": "latent_thoughts",
        "thoughts": 2,
        "solver": "gauss_seidel",
        "gauss_seidel": {"eval": 12},
    },
    "pause": {"kind": "pause", "pauses": 2},
    "loop": {"kind": "loop", "loops": 2},
    "ponder": {"kind": "ponder", "steps": 2},
    "hidden_ponder": {"kind": "hidden_ponder", "steps": 2},
    "depth": {"kind": "depth", "prelude": 1, "coda": 0},
}


@both_backbones
@pytest.mark.parametrize("recurrence", list(KINDS.values()), ids=list(KINDS))
@settings(max_examples=8, deadline=None)
@given(
    mask=masks(),
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2),
    padded=st.booleans(),
    seed=st.integers(0, 9),
)
def test_under_every_mask_parallel_is_sequential(backbone, recurrence, mask, lengths, padded, seed):
    model, longest = tiny(backbone, recurrence), max(lengths)
    model.mask = mask
    ids = some_ids(2, longest, seed)
    padding = None
    if padded:
        padding = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    documents = torch.arange(longest).expand(2, -1) // 2 if mask.needs_documents else None
    parallel = model(ids, attention_mask=padding, documents=documents).logits
    cache = model.cache()
    for at in range(longest):
        here = slice(at, at + 1)
        document = None if documents is None else documents[:, here]
        present = None if padding is None else padding[:, here]
        logits = model.step(ids[:, here], cache, present, document)
        real = slice(None) if padding is None else padding[:, at].bool()
        torch.testing.assert_close(logits[real], parallel[real, at], atol=1e-9, rtol=0)


@both_backbones
def test_a_window_and_hidden_thoughts_change_what_is_computed(backbone):
    """So the tests above would notice an option that has no effect."""
    model, ids = tiny(backbone, KINDS["jacobi"]), some_ids(1, 6)
    plain, seen = model(ids).logits, []
    for options in (
        {"window": 2},
        {"thoughts": "own"},
        {"thoughts": "last"},
        {"thoughts": "own", "window": 3},
    ):
        model.mask = Causal(**options)
        seen.append(model(ids).logits)
        assert (seen[-1] - plain)[:, 3:].abs().amax(-1).min() > 1e-4
        torch.testing.assert_close(seen[-1][:, 0], plain[:, 0], atol=1e-9, rtol=0)
    model.mask = Causal(window=6)
    assert torch.equal(model(ids).logits, plain)
