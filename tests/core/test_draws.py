"""Keyed draws: the same for ever, uniform, and independent from key to key."""

from collections import Counter
from itertools import pairwise

import pytest

from lattice.draws import Draw

UNIFORM = [0.9424173235373828, 0.5297290826224927, 0.8821755634973082]
COUNTS = [4, 3, 4, 2, 2, 4, 4, 3, 2, 2, 2, 3]


def test_the_values_are_those_that_published_runs_drew():
    """A change here changes what every seed means: runs before and after could not be compared."""
    assert Draw(0, 0).uniform("jacobi") == UNIFORM[0]
    assert Draw(1234, 142_999).uniform("jacobi") == UNIFORM[1]
    assert Draw(0, 0).uniform("other") == UNIFORM[2]
    assert [Draw(0, step).integer("jacobi", 2, 4) for step in range(12)] == COUNTS


def test_a_draw_depends_on_its_key_alone():
    first = [Draw(7, step).uniform("jacobi") for step in range(5)]
    for step in reversed(range(5)):
        Draw(7, step).uniform("something between")
        assert Draw(7, step).uniform("jacobi") == first[step]


def test_each_part_of_the_key_counts():
    keys = [(seed, step, name) for seed in (0, 1, 11) for step in (0, 1, 11) for name in ("a", "b")]
    assert len({Draw(seed, step).uniform(name) for seed, step, name in keys}) == len(keys)


@pytest.mark.parametrize(("low", "high"), [(2, 4), (0, 1), (0, 6)])
def test_integers_are_uniform_over_both_ends(low, high):
    n = 6000
    counts = Counter(Draw(1, step).integer("jacobi", low, high) for step in range(n))
    assert set(counts) == set(range(low, high + 1))
    expected = n / (high - low + 1)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 25  # beyond the 99.9th percentile for up to 6 degrees of freedom, 22.5


def test_a_range_of_one_number_is_that_number():
    assert {Draw(3, step).integer("jacobi", 5, 5) for step in range(50)} == {5}


def test_uniforms_fill_the_unit_interval_and_successive_steps_are_uncorrelated():
    values = [Draw(5, step).uniform("x") for step in range(4000)]
    assert all(0 <= value < 1 for value in values)
    assert max(Counter(int(value * 10) for value in values).values()) < 480
    mean = sum(values) / len(values)
    assert abs(mean - 0.5) < 0.02
    lagged = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(values)) / len(values) * 12
    assert abs(lagged) < 0.06
