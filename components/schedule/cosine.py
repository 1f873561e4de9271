"""Half a cosine from the peak to the floor (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lattice.components.schedule._warmup import check_fractions, peak_step, progress, rising, towards
from lattice.protocols import Schedule
from lattice.registry import register


@register("schedule", "cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to the floor; the defaults are Pythia's."""

    warmup: float = 0.01
    """Fraction of the steps."""
    floor: float = 0.1
    """Fraction of the peak learning rate that the last step takes."""

    def __post_init__(self) -> None:
        check_fractions(warmup=self.warmup, floor=self.floor)

    def factor(self, step: int, steps: int) -> float:
        warming = rising(step, self.warmup, steps)
        if warming is not None:
            return warming
        done = progress(step, peak_step(self.warmup, steps), steps)
        return towards(self.floor, (1 + math.cos(math.pi * done)) / 2)
