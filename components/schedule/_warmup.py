"""What the schedules share: a linear warm-up to 1, then a descent from 1 to the floor.

The first step takes 1/w of the peak for w steps of warm-up, the w-th all of it, the last step the floor.
"""

from __future__ import annotations


def check_fractions(**options: float) -> None:
    """Raises ValueError for an option that is no fraction."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: must be between 0 and 1")


def peak_step(warmup: float, steps: int) -> int:
    """The first step at the full learning rate."""
    return max(round(warmup * steps) - 1, 0)


def rising(step: int, warmup: float, steps: int) -> float | None:
    """The factor while warming up, None from the peak on."""
    assert 0 <= step < steps, f"step {step} is not one of 0..{steps - 1}"
    peak = peak_step(warmup, steps)
    return (step + 1) / (peak + 1) if step < peak else None


def progress(step: int, start: int, steps: int) -> float:
    """0 until `start`, then evenly to 1 at the last step. A descent without room stays at 0: a run of one
    step takes it at the peak."""
    last = steps - 1
    return max(step - start, 0) / (last - start) if last > start else 0.0


def towards(floor: float, height: float) -> float:
    """1 for height 1, `floor` for height 0, exactly."""
    return floor + (1 - floor) * height
