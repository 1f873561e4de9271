"""Texts that share rows: nothing lost, little computed, nothing too long."""

from hypothesis import given
from hypothesis import strategies as st

from lattice.branching import SAVED, rows

contexts = st.lists(st.integers(0, 1), max_size=6).map(tuple)
texts = st.lists(
    st.tuples(contexts, st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple)).map(
        lambda parts: parts[0] + parts[1]
    ),
    min_size=1,
    max_size=20,
)


@given(texts=texts, most=st.integers(0, 30), alone=st.floats(0, 100))
def test_every_text_is_in_one_row(texts, most, alone):
    def cost(size):
        return size * (alone + size)

    found = rows(texts, most, alone)
    assert sorted(text for row in found for text in row.texts) == sorted(set(texts))
    for row in found:
        assert len(row.ids) == len(row.branches) == row.size
        assert len(row.texts) == 1 or row.size <= most
        first, *others = (cost(len(text)) for text in row.texts)
        assert cost(row.size) <= first + (1 - SAVED) * sum(others) + 1e-6
        for number, (text, places) in enumerate(zip(row.texts, row.places, strict=True), 1):
            assert [row.ids[place] for place in places] == list(text)
            assert {row.branches[place] for place in places} <= {0, number}


def test_a_context_is_there_once():
    question, other = tuple(range(20)), tuple(range(50, 70))
    answers = [(*start, 98, end) for start in (question, other) for end in range(90, 94)]
    assert [row.size for row in rows(answers, 100, 100)] == [25, 25]
    assert [row.size for row in rows(answers, 23, 100)] == [23, 23, 23, 23]  # two answers fit
    assert len(rows(answers, 0, 100)) == 8
    assert len(rows([(1, *question), (1, *other)], 100, 100)) == 2  # one token saved is not worth it
    long = [(*question, *(end,) * 25) for end in (90, 91)]
    assert [len(rows(long, 100, alone)) for alone in (0, 1000)] == [2, 1]  # nor is a longer row for few
