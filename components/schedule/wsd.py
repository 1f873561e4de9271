"""Warm up, stay at the peak, decay at the end (Hägele et al., arXiv 2405.18392).

Nothing before the decay depends on the number of steps except the warm-up, so that a run can be prolonged
from a checkpoint before its decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lattice.components.schedule._warmup import check_fractions, peak_step, progress, rising, towards
from lattice.protocols import Schedule
from lattice.registry import register


@register("schedule", "wsd")
@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, a constant rate, and a decay over the last steps."""

    warmup: float = 0.01
    """Fraction of the steps."""
    decay: float = 0.2
    """Fraction of the steps, at the end; 0 for a rate that stays."""
    floor: float = 0.0
    """Fraction of the peak learning rate that the last step takes."""
    shape: Literal["linear", "sqrt"] = "linear"
    """Of the decay: 1 - x or 1 - √x, for x the fraction of it that is done."""

    def __post_init__(self) -> None:
        check_fractions(warmup=self.warmup, decay=self.decay, floor=self.floor)
        if self.warmup + self.decay > 1:
            raise ValueError(f"decay = {self.decay}: must be at most {1 - self.warmup:g} (1 - warmup)")
        if self.shape not in ("linear", "sqrt"):
            raise ValueError(f"shape = {self.shape!r}: must be 'linear' or 'sqrt'")

    def factor(self, step: int, steps: int) -> float:
        warming = rising(step, self.warmup, steps)
        if warming is not None:
            return warming
        if self.decay == 0:
            return 1.0
        decaying = max(round(self.decay * steps), 1)
        start = max(steps - 1 - decaying, peak_step(self.warmup, steps))
        done = progress(step, start, steps)
        return towards(self.floor, 1 - (math.sqrt(done) if self.shape == "sqrt" else done))
