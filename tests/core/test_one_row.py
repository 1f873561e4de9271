"""One slot at a time on a CPU: other kernels, the same numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lattice
from lattice.linear import Linear
from lattice.one_row import attention


def tiny(dtype=torch.float32, tied=False):
    backbone = {"kind": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    recurrence = {"kind": "latent_thoughts", "thoughts": 1}
    recipe = {"backbone": {**backbone, "tie_word_embeddings": tied}, "recurrence": recurrence}
    return lattice.build_model(recipe).to(dtype)


IDS = torch.randint(96, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_in_float32_is_the_last_of_all_tokens(tied):
    model = tiny(tied=tied)
    with torch.no_grad():
        _, cache = model.prefill(IDS[:, :-1])
        logits_BV = model.step(IDS[:, -1:], cache)
        many_BV = model.prefill(IDS.repeat(3, 1))[0]  # products of three rows
    torch.testing.assert_close(logits_BV, many_BV[:1])


@given(outputs=st.integers(1, 24), inputs=st.integers(1, 24), threads=st.integers(1, 8), biased=st.booleans())
def test_products_in_parts_are_those_of_torch(outputs, inputs, threads, biased):
    linear = Linear(inputs, outputs, bias=biased)
    x_11D = torch.randn(1, 1, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            in_parts = linear(x_11D)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(
        in_parts, torch.nn.functional.linear(x_11D, linear.weight, linear.bias).detach()
    )


def test_what_is_not_one_row_of_float32_is_left_to_torch():
    linear, x_1D = Linear(8, 8), torch.randn(1, 8)
    assert linear(x_1D).grad_fn.name() == "AddmmBackward0"
    with torch.no_grad():
        assert linear(torch.randn(3, 8)).shape == (3, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x_1D).dtype == torch.bfloat16
        linear.weight.data = linear.weight.t()
        torch.testing.assert_close(linear(x_1D), x_1D @ linear.weight.t() + linear.bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_in_bfloat16_is_the_last_of_all_tokens(autocast):
    model = tiny(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, cache = model.prefill(IDS[:, :-1])
        logits_BV = model.step(IDS[:, -1:], cache)
        many_BV = model.prefill(IDS.repeat(3, 1))[0]  # products of three rows
    assert logits_BV.dtype == many_BV.dtype == torch.bfloat16
    torch.testing.assert_close(logits_BV, many_BV[:1], rtol=0.05, atol=0.02)


def test_one_query_in_bfloat16_is_nearer_to_the_definition():
    drawn = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 4, n, 16, generator=drawn).bfloat16() for n in (1, 200, 200))
    mask = torch.rand(1, 1, 1, 200, generator=drawn) > 0.5
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask
    )
    with torch.no_grad():
        out = attention(query, key, value, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), rtol=2**-7, atol=1e-6)


def test_oneDNN_is_off_for_one_row_alone(monkeypatch):
    switch, seen = torch.backends.mkldnn, []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: seen.append(switch.enabled))
    linear = Linear(8, 8).bfloat16()
    with torch.no_grad():
        for rows in (1, 2):
            linear(torch.zeros(rows, 8, dtype=torch.bfloat16))
    assert seen == [False, True]
    monkeypatch.undo()
    with torch.no_grad(), pytest.raises(RuntimeError, match="mat1 and mat2"):
        linear(torch.zeros(1, 7, dtype=torch.bfloat16))
    assert switch.enabled


@pytest.mark.parametrize("autocast", [False, True])
def test_keys_are_kept_as_one_query_reads_them(autocast):
    """In float32, and rounded as they came: what several queries get is what they get without a cache."""
    model = tiny(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_BV, cache = model.prefill(IDS, parallel=True)
        parallel_BV = model(IDS).logits[:, -1]
    keys = cache._layers[0].read(0, 4)[0]
    assert keys.dtype == torch.float32
    assert torch.equal(keys, keys.bfloat16().float())
    assert torch.equal(logits_BV, parallel_BV)
