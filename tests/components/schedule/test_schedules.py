from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice.components.schedule.cosine import Cosine
from lattice.components.schedule.linear import Linear
from lattice.components.schedule.wsd import WarmupStableDecay

fractions = st.floats(0, 1)
schedules = st.one_of(
    st.builds(Cosine, warmup=fractions, floor=fractions),
    st.builds(Linear, warmup=fractions, floor=fractions),
    st.builds(
        lambda warmup, part, floor, shape: WarmupStableDecay(
            warmup=warmup, decay=part * (1 - warmup), floor=floor, shape=shape
        ),
        fractions,
        fractions,
        fractions,
        st.sampled_from(["linear", "sqrt"]),
    ),
)


def curve(schedule: Any, steps: int) -> list[float]:
    return [schedule.factor(step, steps) for step in range(steps)]


def test_warmup_takes_equal_parts_and_reaches_the_peak() -> None:
    for schedule in (Cosine(warmup=0.1), Linear(warmup=0.1), WarmupStableDecay(warmup=0.1)):
        assert curve(schedule, 40)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_values() -> None:
    values = curve(Cosine(warmup=0, floor=0.1), 101)
    assert values[0] == 1.0
    assert values[25] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)
    assert values[50] == pytest.approx(0.55, rel=1e-12)
    assert values[100] == 0.1


def test_cosine_agrees_with_torch() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=99, eta_min=0.1)
    for value in curve(Cosine(warmup=0, floor=0.1), 100):
        assert value == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def test_linear_values() -> None:
    assert curve(Linear(warmup=0, floor=0.0), 5) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert curve(Linear(warmup=0, floor=0.5), 5) == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_wsd_values() -> None:
    assert curve(WarmupStableDecay(warmup=0.2, decay=0.4), 10) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]
    )
    rooted = curve(WarmupStableDecay(warmup=0.2, decay=0.4, shape="sqrt", floor=0.2), 10)
    assert rooted[6:] == pytest.approx([0.2 + 0.8 * (1 - math.sqrt(x)) for x in (0.25, 0.5, 0.75, 1)])


def test_wsd_without_a_decay_stays_at_the_peak() -> None:
    assert curve(WarmupStableDecay(warmup=0.2, decay=0), 10) == [0.5] + [1.0] * 9


def test_wsd_before_its_decay_does_not_know_how_long_the_run_is() -> None:
    schedule = WarmupStableDecay(warmup=0.01)
    assert all(schedule.factor(step, steps) == 1.0 for steps in (1000, 2000) for step in range(20, 799))


@given(schedules, st.integers(1, 300))
def test_rises_to_the_peak_then_descends_to_the_floor(schedule: Any, steps: int) -> None:
    values = curve(schedule, steps)
    peak = values.index(max(values))
    assert max(values) == 1.0
    assert values[0] >= 1 / steps
    assert all(a < b for a, b in pairwise(values[: peak + 1]))
    assert all(b <= a for a, b in pairwise(values[peak:]))
    assert min(values[peak:]) >= min(schedule.floor, 1)
    room = max(round(schedule.warmup * steps) - 1, 0) < steps - 1
    decays = not isinstance(schedule, WarmupStableDecay) or schedule.decay > 0
    assert values[-1] == (schedule.floor if room and decays else 1.0)


@pytest.mark.parametrize("kind", [Cosine, Linear, WarmupStableDecay])
@pytest.mark.parametrize("option", ["warmup", "floor"])
@pytest.mark.parametrize("value", [-0.1, 2.0, float("nan")])
def test_fractions_are_checked(kind: Any, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{option} = {value}: must be between 0 and 1"):
        kind(**{option: value})


def test_wsd_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^decay = 0.7: must be at most 0.5"):
        WarmupStableDecay(warmup=0.5, decay=0.7)
    with pytest.raises(ValueError, match=r"^shape = 'cube'"):
        WarmupStableDecay(shape="cube")  # type: ignore[arg-type]
