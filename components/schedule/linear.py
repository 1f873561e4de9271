"""A straight line from the peak to the floor."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.components.schedule._warmup import check_fractions, peak_step, progress, rising, towards
from lattice.protocols import Schedule
from lattice.registry import register


@register("schedule", "linear")
@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Linear warm-up, then a straight line down to the floor."""

    warmup: float = 0.01
    """Fraction of the steps."""
    floor: float = 0.0
    """Fraction of the peak learning rate that the last step takes."""

    def __post_init__(self) -> None:
        check_fractions(warmup=self.warmup, floor=self.floor)

    def factor(self, step: int, steps: int) -> float:
        warming = rising(step, self.warmup, steps)
        if warming is not None:
            return warming
        return towards(self.floor, 1 - progress(step, peak_step(self.warmup, steps), steps))
