"""What masks let slots see, against loops over slots, as booleans and as blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_models import masks, tiny
from torch.nn.attention.flex_attention import create_block_mask

import lattice
from lattice import attention_mask as attention_masks
from lattice.attention_mask import BLOCK, allowed, attention_mask, before_or_at, block_mask
from lattice.components.mask.causal import Causal
from lattice.components.mask.document import Document
from lattice.decoder import AttentionMask, attend, rotary_tables
from lattice.slots import Slots, Tokens
from lattice.stack import Stack


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


def by_hand(mask, real, document, queries, keys, row):
    """(Q, K) from lists of (token, stage)."""
    last = max(stage for _, stage in keys)

    def between(query, key):
        """Real tokens after the key's, up to the query's."""
        return query - key if real is None else int(real[row, key + 1 : query + 1].sum())

    def visible(query, key):
        if mask.window is not None and between(query[0], key[0]) >= mask.window:
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
    pairs = [list(zip(s.token_BS[0].tolist(), s.stage_S.tolist(), strict=True)) for s in (queries, keys)]
    blocks = block_mask(mask, queries, keys).mask
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
    assert list(zip(slots.token_BS[0].tolist(), slots.stage_S.tolist(), strict=True)) == order
    check(mask, real, document, slots, slots, len(ids))
    fast = (
        real is None
        and (mask.kind == "causal" or document is None)
        and (mask.window is None or mask.window >= ids.shape[1])
        and (mask.thoughts == "all" or stages == 1)
    )
    assert (allowed(mask, slots, slots) is None) == fast
    assert attention_mask(mask, slots, slots, newest=True).causal == fast


@settings(max_examples=60, deadline=None)
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
        torch.testing.assert_close(keys.token_BS, cached.token_BS)
    check(mask, real, document, queries, keys, rows)

    stage = data.draw(st.integers(0, stages - 1))
    one = Slots.interleaved(rest, 1, first_stage=stage)
    check(mask, real, document, one, keys, rows)

    swept = [Slots.interleaved(whole, 1, first_stage=at) for at in range(stages)]  # stage-major, as sweeps
    for more in swept[1:]:
        swept[0] = swept[0].followed_by(more)
    check(mask, real, document, Slots.interleaved(whole, 1, first_stage=stage), swept[0], rows)


@settings(max_examples=60, deadline=None)
@given(
    mask=masks(),
    rows=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3),
    left=st.integers(0, 2),
    stages=st.integers(1, 3),
)
def test_a_text_of_a_row_that_branches_sees_what_it_sees_alone(mask, rows, left, stages):
    """`rows` are the lengths of a context and of its continuations; padding is on both sides."""
    branch = torch.zeros(len(rows), left + max(map(sum, rows)), dtype=torch.long)
    real = torch.zeros_like(branch)
    for row, lengths in enumerate(rows):
        numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
        branch[row, left : left + len(numbers)] = torch.tensor(numbers)
        real[row, left : left + len(numbers)] = 1
    tokens = Tokens.of(torch.zeros_like(branch), None if real.all() else real, None, branch)
    slots = Slots.interleaved(tokens, stages)
    seen, blocks = allowed(mask, slots, slots), block_mask(mask, slots, slots).mask
    for row, lengths in enumerate(rows):
        for number in range(len(lengths)):
            text = real[row].bool() & ((branch[row] == 0) | (branch[row] == number))
            alone = Tokens.of(torch.zeros(1, int(text.sum()), dtype=torch.long))
            torch.testing.assert_close(tokens.position_BL[row, text][None], alone.position_BL)
            same = Slots.interleaved(alone, stages)
            expected = allowed(mask, same, same)
            if expected is None:
                expected = before_or_at(same.queries(), same.keys())
            of_text = text.repeat_interleave(stages)
            torch.testing.assert_close(seen[row, of_text][:, of_text], expected[0])
            if number or len(lengths) == 1:  # a context is seen by all
                last = int(of_text.nonzero().max())
                assert not seen[row, last, ~of_text].any()
                there = [
                    blocks.mask_mod(*map(torch.tensor, (row, 0, last, key))) for key in range(len(of_text))
                ]
                torch.testing.assert_close(torch.stack(there).flatten(), seen[row, last])


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
    query = torch.randn(2, 2 * length, 4, 8, generator=generator)
    key, value = (torch.randn(2, 2, 2 * length, 8, generator=generator) for _ in range(2))
    dense = AttentionMask(causal=False, allowed=allowed(mask, slots, slots)[:, None])
    blocks = AttentionMask(causal=False, blocks=block_mask(mask, slots, slots))
    one, other = (attend(query, key, value, rotary, kind) for kind in (dense, blocks))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_blocks_move_with_all_that_they_read():
    real = torch.ones(2, 140, dtype=torch.long)
    slots = Slots.interleaved(Tokens.of(real, real, real), 2)
    mask = AttentionMask(causal=False, blocks=block_mask(Document(), slots, slots))
    assert mask.to("cpu").blocks is mask.blocks
    moved = mask.to("meta").blocks.mask
    assert moved.kv_indices.is_meta
    place_1 = torch.zeros(1, dtype=torch.int64, device="meta")
    assert moved.mask_mod(place_1, place_1, place_1, place_1).is_meta


@pytest.mark.parametrize("pairs", [1, 2**16, 2**22])
@pytest.mark.parametrize(("lengths", "stages"), [((70, 70), 2), ((128, 128), 3), ((33, 300), 1)])
def test_blocks_are_those_that_torch_finds(pairs, lengths, stages, monkeypatch):
    """create_block_mask looks at all pairs at once; how many are looked at together changes nothing."""
    monkeypatch.setattr(attention_masks, "PAIRS", pairs)
    queries, keys = lengths
    documents = torch.arange(keys).expand(2, -1) // torch.tensor([[40], [150]])
    slots = Slots.interleaved(Tokens.of(torch.zeros(2, keys), None, documents), stages)
    newest = slots.part((keys - queries) * stages, keys * stages, slots.stop)
    for mask in (Causal(), Document(), Document(window=20, thoughts="last"), Causal(window=140)):
        ours = block_mask(mask, newest, slots).mask
        theirs = create_block_mask(
            ours.mask_mod, 2, None, queries * stages, keys * stages, device="cpu", BLOCK_SIZE=BLOCK
        )
        assert ours.seq_lengths == theirs.seq_lengths
        assert torch.equal(ours.to_dense().expand(2, -1, -1, -1), theirs.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name).expand(2, -1, -1), getattr(theirs, name)), name
        for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
            assert torch.equal(getattr(ours, name).expand(2, -1, -1, -1), getattr(theirs, name)), name


class Wrong(Causal):
    answer: torch.Tensor

    def sees(self, query, key):
        return Wrong.answer


@pytest.mark.parametrize(
    "answer",
    [torch.ones(1, 4, 4), torch.ones(1, 4, 3).bool(), torch.ones(4, 4).bool(), torch.ones(2, 4, 4).bool()],
)
def test_a_mask_that_attention_cannot_take_is_refused(answer):
    Wrong.answer = answer
    slots = Slots.interleaved(Tokens.of(torch.zeros(1, 4, dtype=torch.long)), 1)
    with pytest.raises(ValueError, match=r"mask 'causal': sees\(\) gave .* must be booleans that broadcast"):
        attention_mask(Wrong(), slots, slots, newest=True)


def test_a_cache_does_not_inherit_the_masks_of_one_that_is_gone():
    """Which may have lain at the same place in memory, with the same number of passes over other slots."""
    model = tiny("llama", {"kind": "none"})
    tokens = Tokens.of(torch.zeros(1, 4, dtype=torch.long))
    slots_BLnD = torch.randn(1, 4, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def swept_again(stack, stages):
        cache = stack.cache()
        stack.run(slots_BLnD[:, :, :1], cache=cache)
        stack.run(slots_BLnD[:, :, 1:stages], first_stage=1, cache=cache)
        return stack.run(slots_BLnD[:, :, :1], cache=cache)

    with torch.no_grad():
        stacks = [Stack(model.decoder, model.mask, model.checkpointing, tokens) for _ in range(2)]
        swept_again(stacks[0], 2)
        one, other = (swept_again(stack, 3) for stack in stacks)
    torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window = 0"), ({"thoughts": "none"}, "thoughts"), ({"windw": 3}, "windw")],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(lattice.RecipeError, match=message):
        lattice.load_recipe({"mask": {"kind": "causal", **options}})
