"""One slot at a time on a CPU: other kernels and another order in memory, the same numbers."""

import pytest
import torch

import lattice
from lattice.draws import Draw
from lattice.one_row import attention, fast_products, lay_out


def tiny(dtype=torch.float32, tied=False):
    backbone = {"kind": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    recurrence = {"kind": "latent_thoughts", "thoughts": 1}
    recipe = {"backbone": {**backbone, "tie_word_embeddings": tied}, "recurrence": recurrence}
    return lattice.build_model(recipe).to(dtype)


IDS = torch.randint(96, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
def test_another_order_in_memory_is_the_same_model(tied):
    given, laid = tiny(tied=tied), tiny(tied=tied)
    lay_out(laid)
    assert not laid.decoder.head.weight.is_contiguous()
    assert laid.decoder.blocks[0].mlp.down_proj.weight.is_contiguous()  # fewer outputs than inputs
    assert (laid.decoder.head.weight is laid.decoder.embedding.weight) == tied
    for (name, one), (other, two) in zip(given.state_dict().items(), laid.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two)
    assert torch.equal(lattice.generate(laid, IDS, 6), lattice.generate(given, IDS, 6))
    losses = [model(IDS, targets=IDS, draw=Draw(0, 0)).loss for model in (given, laid)]
    torch.testing.assert_close(*losses)
    losses[1].backward()
    again = [parameter.is_contiguous() for parameter in laid.parameters()]
    lay_out(laid)
    assert [parameter.is_contiguous() for parameter in laid.parameters()] == again


def test_what_autocast_casts_stays_as_it_is():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        lay_out(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


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


def test_oneDNN_is_off_for_one_row_alone():
    switch = torch.backends.mkldnn
    for rows, on in ((1, False), (2, True)):
        with fast_products(torch.zeros(rows, 8)):
            assert switch.enabled == on
    with pytest.raises(KeyError), fast_products(torch.zeros(1, 8)):
        raise KeyError
    assert switch.enabled
