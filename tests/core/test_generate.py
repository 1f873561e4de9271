"""Decoding with the cache: against full recomputation, in padded batches, and the choice of tokens."""

import pytest
import torch

import lattice
from lattice.cache import KVCache
from lattice.generate import Sampling, stream

VOCABULARY, CONTEXT = 29, 96
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))
NONE = {"kind": "none"}


def thinking(thoughts, eval_count=3):
    return {"kind": "latent_thoughts", "thoughts": thoughts, "jacobi": {"eval": eval_count}}


def tiny(backbone="llama", recurrence=NONE, **tables):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    options = {**BACKBONES[backbone], **sizes, "max_position_embeddings": CONTEXT}
    model = lattice.build_model({"backbone": options, "recurrence": recurrence, **tables}).double()
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.parameters():
            # The final norm's bias is the same at every place: were it large, so would be the tokens.
            scale = 0.3 if parameter.dim() > 1 else 0.03
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def recomputed(model, ids, new_tokens):
    """Greedy decoding without a cache: everything anew for each token."""
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@both_backbones
@pytest.mark.parametrize("thoughts", [None, 0, 1, 2, 3])
def test_greedy_decoding_is_full_recomputation(backbone, thoughts):
    prompt, new_tokens = some_ids(12, 4), 6
    exact = (thoughts or 0) * (4 + new_tokens - 1)
    model = tiny(backbone, NONE if thoughts is None else thinking(thoughts, exact))
    expected = recomputed(model, prompt, new_tokens)
    assert len(expected[:, 4:].unique()) > 2  # a constant text would tell little
    for parallel in (False, True):
        assert torch.equal(lattice.generate(model, prompt, new_tokens, parallel_prefill=parallel), expected)


@both_backbones
@pytest.mark.parametrize("thoughts", [None, 1, 2])
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_left_padded_prompts_give_what_each_gives_alone(backbone, thoughts, mask):
    model = tiny(backbone, NONE if thoughts is None else thinking(thoughts), mask={"kind": mask})
    lengths = [7, 1, 4, 6]
    prompts = [some_ids(1, length, seed) for seed, length in enumerate(lengths)]
    for padding in (0, 5):
        ids = torch.full((4, 7), padding)
        present = torch.zeros(4, 7, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, 7 - lengths[row] :], present[row, 7 - lengths[row] :] = prompt[0], 1
        for parallel in (False, True):
            together = lattice.generate(model, ids, 8, attention_mask=present, parallel_prefill=parallel)
            assert torch.equal(together[:, :7], ids)
            for row, prompt in enumerate(prompts):
                alone = lattice.generate(model, prompt, 8, parallel_prefill=parallel)[0, lengths[row] :]
                assert together[row, 7:].tolist() == alone.tolist()
    assert torch.equal(
        lattice.generate(model, prompts[0], 8, attention_mask=torch.ones(1, 7)),
        lattice.generate(model, prompts[0], 8),
    )


@both_backbones
@pytest.mark.parametrize("thoughts", [0, 1, 2, 3])
def test_parallel_and_sequential_prefill(backbone, thoughts):
    ids, present = some_ids(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    model = tiny(backbone, thinking(thoughts, thoughts * 4))
    one, several = model.prefill(ids, present, parallel=True), model.prefill(ids, present)
    torch.testing.assert_close(one[0], several[0], atol=1e-10, rtol=0)
    assert one[1].tokens == several[1].tokens == 5
    for _ in range(3):  # and the caches go on alike
        token = one[0].argmax(dim=-1, keepdim=True)
        one, several = [(model.step(token, cache), cache) for _, cache in (one, several)]
        torch.testing.assert_close(one[0], several[0], atol=1e-10, rtol=0)
    if thoughts:
        hasty = tiny(backbone, thinking(thoughts, 0)).prefill(ids, present, parallel=True)
        assert (hasty[0] - model.prefill(ids, present)[0]).abs().max() > 1e-4


@both_backbones
@pytest.mark.parametrize("recurrence", [NONE, thinking(2)], ids=["none", "thoughts"])
def test_a_cache_grows_beyond_its_first_buffer(backbone, recurrence):
    model, ids = tiny(backbone, recurrence), some_ids(2, CONTEXT - 1)
    cache, sizes = KVCache(model.shape.num_layers), set()
    for at in range(ids.shape[1]):
        logits = model.step(ids[:, at : at + 1], cache)
        sizes.add(cache._layers[0]._keys_BHSE.shape[2])
    slots = model.recurrence.slots
    assert len(sizes) == (2 if slots == 1 else 3)
    assert len(cache.slots.stage_S) == slots * (CONTEXT - 1)
    if slots == 1:
        torch.testing.assert_close(logits, model(ids).logits[:, -1], atol=1e-10, rtol=0)
    small = KVCache(model.shape.num_layers)  # the same where one large buffer was there from the start
    for layer in small._layers:
        layer._keys_BHSE, layer._values_BHSE = (
            torch.empty(2, cache._layers[0]._keys_BHSE.shape[1], 4 * CONTEXT, layer_size, dtype=torch.float64)
            for layer_size in [cache._layers[0]._keys_BHSE.shape[3]] * 2
        )
    for at in range(ids.shape[1]):
        again = model.step(ids[:, at : at + 1], small)
    torch.testing.assert_close(again, logits, atol=1e-12, rtol=0)


def test_top_k_of_one_is_greedy():
    model, prompt = tiny(recurrence=thinking(1)), some_ids(3, 4)
    greedy = lattice.generate(model, prompt, 8)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 0.5}):
        for seed in range(3):
            drawn = lattice.generate(model, prompt, 8, temperature=2.0, seed=seed, **options)
            assert torch.equal(drawn, greedy)


def generators(seed, rows):
    """The same one for all rows: independent draws."""
    return [torch.Generator().manual_seed(seed)] * rows


def drawn_counts(sampling, probabilities, rows=4000):
    logits = torch.tensor(probabilities).log()[None].expand(rows, -1)
    ids = sampling.choose(logits, generators(0, rows))
    assert ids.shape == (rows, 1)
    return torch.bincount(ids[:, 0], minlength=len(probabilities)) / rows


PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 5}, PROBABILITIES),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 1.0}, PROBABILITIES),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.3}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.45}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.7}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),  # 0.4 is 0.62 of what top_k leaves
        ({"top_k": 3, "top_p": 0.99}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
    ],
)
def test_the_support_and_the_shares_of_draws(options, expected):
    shares = drawn_counts(Sampling(temperature=1.0, **options), PROBABILITIES)
    assert ((shares > 0) == (torch.tensor(expected) > 0)).all()
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), atol=0.04, rtol=0)


def test_temperature():
    squared = torch.tensor(PROBABILITIES) ** 2
    shares = drawn_counts(Sampling(temperature=0.5), PROBABILITIES)
    torch.testing.assert_close(shares, squared / squared.sum(), atol=0.04, rtol=0)


def test_each_row_has_its_own_support():
    logits = torch.tensor([[0.0, 5, 0, 4], [6, 0, 5.5, 0]]).repeat(200, 1)
    for options in ({"top_k": 2}, {"top_p": 0.95}):
        ids = Sampling(temperature=1.0, **options).choose(logits, generators(1, len(logits)))
        assert set(ids[0::2, 0].tolist()) == {1, 3}
        assert set(ids[1::2, 0].tolist()) == {0, 2}


def test_same_seed_same_text():
    model, prompt = tiny(recurrence=thinking(1)), some_ids(2, 3)
    options = {"temperature": 1.5, "top_k": 20}
    first = lattice.generate(model, prompt, 10, seed=4, **options)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(lattice.generate(model, prompt, 10, seed=4, **options), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(lattice.generate(model, prompt, 10, seed=5, **options), first)
    unseeded = [lattice.generate(model, prompt, 10, **options) for _ in range(2)]
    assert not torch.equal(*unseeded)


def test_a_sampled_row_is_the_row_alone():
    model, prompt = tiny(recurrence=thinking(1)), some_ids(3, 3)
    options = {"temperature": 1.5, "top_p": 0.9}
    together = lattice.generate(model, prompt, 10, seed=4, **options)
    for row in range(3):
        alone = lattice.generate(model, prompt[row : row + 1], 10, seed=4 + row, **options)
        assert torch.equal(alone[0], together[row])
    turned = lattice.generate(model, prompt.flip(0), 10, seed=[6, 5, 4], **options)
    assert torch.equal(turned.flip(0), together)
    with pytest.raises(ValueError, match=r"seed = \[1, 2\]: must be one for each of the 3 rows"):
        lattice.generate(model, prompt, 1, seed=[1, 2], **options)


def test_end_of_text():
    model, prompt = tiny(), some_ids(4, 3)
    whole = lattice.generate(model, prompt, 12)
    new = whole[:, 3:]
    eos = int(new[0, 4])
    cut = lattice.generate(model, prompt, 12, eos_id=eos)
    ends = [(row == eos).nonzero()[:1].flatten().tolist() for row in new]
    longest = max(end[0] + 1 if end else 12 for end in ends)
    assert cut.shape == (4, 3 + longest)
    for row, end in enumerate(ends):
        stop = end[0] + 1 if end else longest
        assert cut[row, 3 : 3 + stop].tolist() == new[row, :stop].tolist()
        assert (cut[row, 3 + stop :] == eos).all()
    alone = lattice.generate(model, prompt[:1], 12, eos_id=eos)
    assert alone.shape[1] == 3 + ends[0][0] + 1
    assert (alone[0] == eos).sum() == 1 + (prompt[0] == eos).sum()


@pytest.fixture
def untouched():
    """A model that must refuse before it computes anything."""
    model = tiny(recurrence=thinking(1))

    def fail(*args):
        raise AssertionError("computed before the arguments were checked")

    model.decoder.embedding.register_forward_pre_hook(fail)
    return model


@pytest.mark.parametrize("parallel", [False, True])
def test_too_long_a_prompt(untouched, parallel):
    with pytest.raises(ValueError, match=f"prompt of 90 tokens and 7 new ones .* context of {CONTEXT}"):
        stream(untouched, some_ids(1, 90), 7, parallel_prefill=parallel)
    with pytest.raises(ValueError, match=f"prompt of 97 tokens .* context of {CONTEXT}"):
        lattice.generate(untouched, some_ids(1, 97), 0, parallel_prefill=parallel)
    with pytest.raises(ValueError, match=f"97 tokens do not fit the model's context of {CONTEXT}"):
        untouched.prefill(some_ids(1, 97), parallel=parallel)
    with pytest.raises(ValueError, match=f"97 tokens do not fit the model's context of {CONTEXT}"):
        untouched(some_ids(1, 97))


def test_the_context_can_be_filled():
    model = tiny()
    out = lattice.generate(model, some_ids(1, 90), 6)
    assert out.shape == (1, CONTEXT)
    assert torch.equal(out, recomputed(model, some_ids(1, 90), 6))
    _, cache = model.prefill(out)
    with pytest.raises(ValueError, match="97 tokens do not fit"):
        model.step(out[:, :1], cache)


def test_arguments_that_cannot_be(untouched):
    with pytest.raises(ValueError, match="the prompt is empty"):
        lattice.generate(untouched, torch.empty(1, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="max_new_tokens = -1"):
        lattice.generate(untouched, some_ids(1, 3), -1)
    with pytest.raises(ValueError, match="padded on the left"):
        lattice.generate(untouched, some_ids(2, 3), 3, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    nan, drawn = float("nan"), {"temperature": 1.0}
    for options in (
        {"temperature": -0.1},
        {"temperature": nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            lattice.generate(untouched, some_ids(1, 3), 3, **options)
    for seed in (-1, 2**64, [2**64]):
        with pytest.raises(ValueError, match=r"seed = .*must be at least 0 and less than 2\*\*64"):
            lattice.generate(untouched, some_ids(1, 3), 3, seed=seed, **drawn)
    assert torch.equal(lattice.generate(untouched, some_ids(1, 3), 0), some_ids(1, 3))


@pytest.mark.parametrize("recurrence", [NONE, thinking(1)])
@pytest.mark.parametrize("documents", [False, True])
def test_what_is_said_of_other_tokens_is_refused(recurrence, documents):
    """Neither cut nor shifted to the tokens there are."""
    mask = {"kind": "document"} if documents else {"kind": "causal"}
    model, ids = tiny(recurrence=recurrence, mask=mask), some_ids(2, 8)
    said = {"documents": torch.zeros(2, 8, dtype=torch.long)} if documents else {}
    for shape in [(2, 10), (2, 5), (1, 8), (2, 8, 1)]:
        ones = torch.ones(shape, dtype=torch.long)
        message = rf"attention_mask: has shape \({', '.join(map(str, shape))}\); must be \(2, 8\), as the tok"
        with pytest.raises(ValueError, match=message):
            model(ids, ones, **said)
        for parallel in (False, True):
            with pytest.raises(ValueError, match=message):
                model.prefill(ids, ones, parallel=parallel)
        with pytest.raises(ValueError, match="documents: has shape"):
            model(ids, documents=ones)
        with pytest.raises(ValueError, match="targets: has shape"):
            model(ids, targets=ones, **said)


def test_the_smallest_temperature_takes_the_likeliest_token():
    model, ids = tiny(), some_ids(2, 5)
    assert torch.equal(lattice.generate(model, ids, 4, temperature=1e-42), lattice.generate(model, ids, 4))


def test_an_empty_prompt_cannot_be_prefilled(untouched):
    for parallel in (False, True):
        with pytest.raises(ValueError, match="empty"):
            untouched.prefill(torch.empty(1, 0, dtype=torch.long), parallel=parallel)


@pytest.mark.parametrize("recurrence", [NONE, thinking(1), {"kind": "depth", "prelude": 0, "coda": 1}])
def test_a_step_that_does_not_fit_its_cache_is_refused(recurrence):
    """And leaves the cache as it was."""
    model, ids = tiny(recurrence=recurrence), some_ids(2, 3)
    ones = torch.ones(2, 1, dtype=torch.long)
    expected = model.step(ids[:, :1], model.prefill(ids)[1])
    _, cache = model.prefill(ids)
    for arguments, message in [
        ((ids[:, :2],), r"ids_B1: a step takes one token of each row, \(B, 1\), not \(2, 2\)"),
        ((ids[0, :1],), r"ids_B1: .* not \(1,\)"),
        ((ids[:1, :1],), "ids_B1: must have the 2 rows of the cache, not 1"),
        ((ids[[0, 1, 1], :1],), "ids_B1: must have the 2 rows of the cache, not 3"),
        ((ids[:, :1], ones), "attention_mask_B1: must be None"),
        ((ids[:, :1], None, ones), "documents_B1: must be None"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.step(arguments[0], cache, *arguments[1:])
    assert torch.equal(model.step(ids[:, :1], cache), expected)
    cache = model.cache()
    model.step(ids[:, :1], cache, ones, ones)
    with pytest.raises(ValueError, match="documents_B1: missing"):
        model.step(ids[:, 1:2], cache, ones)
    model.step(ids[:, 1:2], cache, None, ones)  # without a mask a token is a real one
    assert cache.real_tokens().tolist() == [2, 2]


def test_a_stream_is_what_generate_collects():
    model, prompt = tiny(recurrence=thinking(2)), some_ids(2, 4)
    tokens = list(stream(model, prompt, 5))
    assert all(ids.shape == (2, 1) and not ids.requires_grad for ids in tokens)
    assert torch.equal(torch.cat([prompt, *tokens], dim=1), lattice.generate(model, prompt, 5))


def test_rows_beyond_the_tokenizer_are_never_chosen():
    """A padded table: were the head's padding rows the likeliest, they would still be no tokens."""
    logits_BV = torch.tensor([[0.0, 1.0, 0.5, 9.0]])
    generator = torch.Generator().manual_seed(0)
    for sampling in (Sampling(vocab_size=3), Sampling(vocab_size=3, temperature=5.0, seed=0)):
        chosen = {int(sampling.choose(logits_BV, [generator])) for _ in range(50)}
        assert chosen <= {0, 1, 2}
        assert 1 in chosen
