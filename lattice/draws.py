"""Random choices keyed by (seed, step, name).

A draw depends on nothing but its key: every rank, and a run that was interrupted and resumed, draws the
same. A global generator would give each rank its own count of passes, and a sharded model would hang.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    """The random choices of one training step."""

    seed: int
    step: int

    def uniform(self, name: str) -> float:
        """In [0, 1)."""
        return random.Random(f"{self.seed}/{self.step}/{name}").random()

    def integer(self, name: str, low: int, high: int) -> int:
        """Uniform over low..high, both included."""
        return low + int(self.uniform(name) * (high - low + 1))
