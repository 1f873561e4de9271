"""Random choices keyed by (seed, step, name).

A draw depends on nothing but its key: every rank, and a run that was interrupted and resumed, draws the
same. A global generator would give each rank its own count of passes, and a sharded model would hang.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


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


class Most(Draw):
    """The largest of every range, and the largest number of all steps up to this one: what is drawn by it is
    taken to grow with it."""

    def uniform(self, name: str) -> float:
        return _largest(self.seed, self.step, name)

    def integer(self, name: str, low: int, high: int) -> int:
        return high


@lru_cache
def _largest(seed: int, step: int, name: str) -> float:
    return max(Draw(seed, one).uniform(name) for one in range(step + 1))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever draws from the global generators within, they are afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialized else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
