from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice.components.data._shuffle import Shuffle


@given(n=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 100))
def test_is_a_permutation(n, seed, epoch):
    shuffle = Shuffle(n, seed, epoch)
    assert sorted(shuffle(i) for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**45), place=st.integers(0, 2**45))
def test_large_orders_stay_in_range(n, place):
    assert 0 <= Shuffle(n, 3, 1)(place % n) < n


def order(seed, epoch, n=200):
    shuffle = Shuffle(n, seed, epoch)
    return [shuffle(i) for i in range(n)]


def test_same_key_same_order_other_key_other_order():
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25
    assert order(1, 0) != sorted(order(1, 0))


def test_first_place_is_uniform():
    n, trials = 10, 3000
    counts = [0] * n
    for epoch in range(trials):
        counts[Shuffle(n, 7, epoch)(0)] += 1
    chi2 = sum((c - trials / n) ** 2 / (trials / n) for c in counts)
    assert chi2 < 40  # 9 degrees of freedom: p < 1e-5


def test_outside_is_an_error():
    with pytest.raises(IndexError):
        Shuffle(3, 0, 0)(3)
    with pytest.raises(ValueError, match="n = 0"):
        Shuffle(0, 0, 0)
