"""Masks against loops over slots, and the independence of packed documents and of padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lattice
from lattice.attention_mask import allowed, attention_mask, before_or_at, block_mask
from lattice.components.mask.causal import Causal
from lattice.components.mask.document import Document
from lattice.decoder import AttentionMask, attend, rotary_tables
from lattice.slots import Slots, Tokens

VOCABULARY = 23
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
RECURRENCES = {
    "none": {"kind": "none"},
    "one_thought": {"kind": "latent_thoughts", "thoughts": 1, "jacobi": {"eval": 2}},
    "two_thoughts": {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"eval": 3}},
}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))
all_recurrences = pytest.mark.parametrize("recurrence", list(RECURRENCES))


def tiny(backbone, recurrence, mask):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    options = {**BACKBONES[backbone], **sizes, "max_position_embeddings": 32}
    tables = {"backbone": options, "recurrence": RECURRENCES[recurrence], "mask": {"kind": mask}}
    model = lattice.build_model(tables).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@st.composite
def layouts(draw, documents):
    """Rows of tokens with padding or without, documents or without, and a number of stages."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    grid = st.lists(
        st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=rows, max_size=rows
    )
    real = draw(st.none() | grid)
    document = draw(grid) if documents else draw(st.none() | grid)
    return (
        torch.zeros(rows, length, dtype=torch.long),
        None if real is None else torch.tensor(real).bool().long(),
        None if document is None else torch.tensor(document),
        draw(st.integers(1, 4)),
    )


MASKS = {"causal": Causal, "document": Document}


@st.composite
def masks(draw):
    options = {
        "window": draw(st.none() | st.integers(1, 7)),
        "thoughts": draw(st.sampled_from(["all", "own", "last"])),
    }
    return MASKS[draw(st.sampled_from(list(MASKS)))](**options)


def by_hand(mask, real, document, queries, keys, row):
    """(Q, K) from lists of (token, stage)."""
    last = max(stage for _, stage in keys)

    def visible(query, key):
        if mask.window is not None and query[0] - key[0] >= mask.window:
            return False
        if key[0] == query[0] or mask.thoughts == "all":
            return True
        return key[1] == (0 if mask.thoughts == "own" else last)

    def allowed(query, key):
        if query == key:
            return True
        before = key[0] < query[0] or (key[0] == query[0] and key[1] < query[1])
        present = real is None or bool(real[row, key[0]])
        same = mask.kind == "causal" or document is None or document[row, key[0]] == document[row, query[0]]
        return bool(before and present and same and visible(query, key))

    return torch.tensor([[allowed(query, key) for key in keys] for query in queries])


def check(mask, real, document, queries, keys, rows):
    """Booleans and, where there are few pairs, the block mask: both against the definition."""
    answer = allowed(mask, queries, keys)
    pairs = [list(zip(s.token_S.tolist(), s.stage_S.tolist(), strict=True)) for s in (queries, keys)]
    blocks = block_mask(mask, queries, keys)
    for row in range(rows):
        expected = by_hand(mask, real, document, *pairs, row)
        if answer is None:  # says: causal order alone
            torch.testing.assert_close(before_or_at(queries.queries(), keys.keys())[0], expected)
        else:
            assert answer.dtype == torch.bool
            torch.testing.assert_close(answer[row if len(answer) > 1 else 0], expected)
        for q, k in {(0, 0), (len(pairs[0]) - 1, 0), (len(pairs[0]) - 1, len(pairs[1]) - 1)}:
            there = blocks.mask_mod(*(torch.tensor(i) for i in (row, 0, q, k)))
            assert bool(there) == bool(expected[q, k])


@settings(max_examples=100, deadline=None)
@given(mask=masks(), layout=st.booleans().flatmap(layouts))
def test_masks_of_one_pass(mask, layout):
    ids, real, document, stages = layout
    slots = Slots.interleaved(Tokens.of(ids, real, document), stages)
    order = [(t, s) for t in range(ids.shape[1]) for s in range(stages)]
    assert list(zip(slots.token_S.tolist(), slots.stage_S.tolist(), strict=True)) == order
    check(mask, real, document, slots, slots, len(ids))
    fast = (
        real is None
        and (mask.kind == "causal" or document is None)
        and (mask.window is None or mask.window >= ids.shape[1])
        and (mask.thoughts == "all" or stages == 1)
    )
    assert (allowed(mask, slots, slots) is None) == fast
    assert attention_mask(mask, slots, slots, newest=True).causal == fast


@settings(max_examples=100, deadline=None)
@given(mask=masks(), layout=st.booleans().flatmap(layouts), data=st.data())
def test_masks_against_a_cache(mask, layout, data):
    """A part of the tokens is in the cache, the rest comes as one pass or stage by stage."""
    ids, real, document, stages = layout
    rows, length = ids.shape
    cut = data.draw(st.integers(0, length - 1))
    cached = Slots.interleaved(Tokens.of(ids, real, document), stages)

    def part(tensor, *, first, stop):
        return None if tensor is None else tensor[:, first:stop]

    def tokens_from(first, stop):
        past = None if real is None else real[:, :first].sum(dim=1)
        cut_ids, cut_real = part(ids, first=first, stop=stop), part(real, first=first, stop=stop)
        return Tokens.of(
            cut_ids, cut_real, part(document, first=first, stop=stop), first=first, past_real_B=past
        )

    rest = tokens_from(cut, length)
    whole = Tokens.of(ids, real, document)
    if real is not None:  # positions go on where the cached part ended
        torch.testing.assert_close(rest.position_BL, whole.position_BL[:, cut:])
    queries = Slots.interleaved(rest, stages)
    keys = queries
    if cut:
        keys = Slots.interleaved(tokens_from(0, cut), stages).followed_by(queries)
        torch.testing.assert_close(keys.token_S, cached.token_S)
    check(mask, real, document, queries, keys, rows)

    stage = data.draw(st.integers(0, stages - 1))
    one = Slots.interleaved(rest, 1, first_stage=stage)
    check(mask, real, document, one, keys, rows)

    swept = [Slots.interleaved(whole, 1, first_stage=at) for at in range(stages)]  # stage-major, as sweeps
    for more in swept[1:]:
        swept[0] = swept[0].followed_by(more)
    check(mask, real, document, Slots.interleaved(whole, 1, first_stage=stage), swept[0], rows)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [4, 5, 5, 5, 5, 5, 6, 6]])


@both_backbones
@all_recurrences
def test_no_document_influences_another(backbone, recurrence):
    model = tiny(backbone, recurrence, "document")
    ids = some_ids(2, 8)
    before = model(ids, documents=DOCUMENTS).logits
    for row, number in [(0, 0), (0, 1), (0, 2), (1, 4), (1, 5), (1, 6)]:
        inside = torch.zeros_like(ids, dtype=torch.bool)
        inside[row] = DOCUMENTS[row] == number
        after = model(torch.where(inside, (ids + 1) % VOCABULARY, ids), documents=DOCUMENTS).logits
        torch.testing.assert_close(after[~inside], before[~inside], atol=1e-12, rtol=0)
        assert ((after - before)[inside].abs().amax(dim=-1) > 1e-3).all()


@both_backbones
@all_recurrences
def test_no_gradient_crosses_documents(backbone, recurrence):
    model = tiny(backbone, recurrence, "document")
    ids = torch.arange(8)[None]  # every token of another row of the table
    model(ids, documents=DOCUMENTS[:1]).logits[0, 3:7].square().sum().backward()
    touched = model.decoder.embedding.weight.grad[:8].abs().sum(dim=1) > 0
    assert touched.tolist() == [False] * 3 + [True] * 4 + [False]


@both_backbones
@all_recurrences
def test_a_packed_document_is_the_document_alone(backbone, recurrence):
    model = tiny(backbone, recurrence, "document")
    ids = some_ids(2, 8)
    packed = model(ids, documents=DOCUMENTS).logits
    for row in range(2):
        for number in DOCUMENTS[row].unique():
            inside = DOCUMENTS[row] == number
            alone = model(ids[row, inside][None]).logits[0]
            torch.testing.assert_close(packed[row, inside], alone, atol=1e-10, rtol=0)


@both_backbones
def test_the_causal_mask_does_let_documents_see_each_other(backbone):
    ids = some_ids(2, 8)
    causal, document = (tiny(backbone, "one_thought", kind) for kind in ("causal", "document"))
    across = causal(ids, documents=DOCUMENTS).logits
    torch.testing.assert_close(across, causal(ids).logits)
    apart = document(ids, documents=DOCUMENTS).logits
    torch.testing.assert_close(across[0, :3], apart[0, :3])
    assert ((across - apart)[0, 3:].abs().amax(dim=-1) > 1e-3).all()
    torch.testing.assert_close(document(ids).logits, causal(ids).logits)  # no documents given: one a row


PADDING = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0] * 6])


@both_backbones
@all_recurrences
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_padding_is_not_seen_and_gives_no_nan(backbone, recurrence, mask):
    model = tiny(backbone, recurrence, mask)
    ids, real = some_ids(5, 6), PADDING.bool()
    documents = torch.arange(6).expand(5, -1) // 3 if mask == "document" else None
    logits = model(ids, attention_mask=PADDING, documents=documents).logits
    assert torch.isfinite(logits).all()
    other = torch.where(real, ids, (ids + 7) % VOCABULARY)
    changed = model(other, attention_mask=PADDING, documents=documents).logits
    torch.testing.assert_close(changed[real], logits[real], atol=1e-12, rtol=0)

    targets = torch.where(real, ids, -100)
    model(ids, attention_mask=PADDING, documents=documents, targets=targets).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    model.zero_grad()
    model(other, attention_mask=PADDING, documents=documents, targets=targets).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-12, rtol=1e-9)


@both_backbones
@all_recurrences
def test_padded_rows_are_the_rows_alone(backbone, recurrence):
    model = tiny(backbone, recurrence, "causal")
    ids = some_ids(5, 6)
    logits = model(ids, attention_mask=PADDING).logits
    for row, real in enumerate(PADDING.bool()):
        if real.any():
            alone = model(ids[row, real][None]).logits[0]
            torch.testing.assert_close(logits[row, real], alone, atol=1e-10, rtol=0)


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
    "depth": {"kind": "depth", "prelude": 1, "coda": 0},
}


@both_backbones
@pytest.mark.parametrize("recurrence", list(KINDS))
@settings(max_examples=8, deadline=None)
@given(mask=masks(), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2), seed=st.integers(0, 9))
def test_under_every_mask_parallel_is_sequential(backbone, recurrence, mask, lengths, seed):
    RECURRENCES["of_this_test"] = KINDS[recurrence]
    model, longest = tiny(backbone, "of_this_test", "causal"), max(lengths)
    model.mask = mask
    ids = some_ids(2, longest, seed)
    padding = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    documents = torch.arange(longest).expand(2, -1) // 2 if mask.needs_documents else None
    parallel = model(ids, attention_mask=padding, documents=documents).logits
    cache = model.cache()
    for at in range(longest):
        here = slice(at, at + 1)
        document = None if documents is None else documents[:, here]
        logits = model.step(ids[:, here], cache, padding[:, here], document)
        real = padding[:, at].bool()
        torch.testing.assert_close(logits[real], parallel[real, at], atol=1e-9, rtol=0)


@both_backbones
def test_a_window_and_hidden_thoughts_change_what_is_computed(backbone):
    """So the tests above would notice an option that has no effect."""
    RECURRENCES["of_this_test"] = KINDS["jacobi"]
    model, ids = tiny(backbone, "of_this_test", "causal"), some_ids(1, 6)
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


@pytest.mark.parametrize("length", [5, 130])
def test_block_masks_give_the_same_attention(length):
    """FlexAttention's own definition on the CPU, over more than one block, with shared heads and padding."""
    generator = torch.Generator().manual_seed(0)
    real = torch.ones(2, length, dtype=torch.long)
    real[0, :3] = 0
    documents = torch.arange(length).expand(2, -1) // 4
    slots = Slots.interleaved(Tokens.of(real, real, documents), 2)
    mask = Document(window=9, thoughts="last")
    rotary = rotary_tables(slots.position_BS, 8, 1e4, torch.float32)
    query = torch.randn(2, 4, 2 * length, 8, generator=generator)
    key, value = (torch.randn(2, 2, 2 * length, 8, generator=generator) for _ in range(2))
    dense = AttentionMask(causal=False, allowed=allowed(mask, slots, slots)[:, None])
    blocks = AttentionMask(causal=False, blocks=block_mask(mask, slots, slots))
    one, other = (attend(query, key, value, rotary, kind, None) for kind in (dense, blocks))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


class Wrong(Causal):
    answer: torch.Tensor

    def sees(self, query, key):
        return Wrong.answer


@pytest.mark.parametrize("answer", [torch.ones(4, 4), torch.ones(1, 4, 3).bool(), torch.ones(4, 4).bool()])
def test_a_mask_that_attention_cannot_take_is_refused(answer):
    Wrong.answer = answer
    slots = Slots.interleaved(Tokens.of(torch.zeros(1, 4, dtype=torch.long)), 1)
    with pytest.raises(ValueError, match=r"mask 'causal': sees\(\) gave .* must be booleans that broadcast"):
        attention_mask(Wrong(), slots, slots, newest=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window = 0"), ({"thoughts": "none"}, "thoughts"), ({"windw": 3}, "windw")],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(lattice.RecipeError, match=message):
        lattice.load_recipe({"mask": {"kind": "causal", **options}})
