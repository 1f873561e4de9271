"""How often to iterate: drawn anew for each training step, fixed at evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.draws import Draw


@dataclass(frozen=True, kw_only=True)
class Iterations:
    """A count of iterations."""

    train: tuple[int, int]
    """Inclusive range; one count is drawn for each step, the same on every rank."""
    eval: int
    """At evaluation and prefill."""

    def __post_init__(self) -> None:
        low, high = self.train
        if not 0 <= low <= high:
            raise ValueError(f"train = [{low}, {high}]: must be a range [low, high] with 0 <= low <= high")
        if self.eval < 0:
            raise ValueError(f"eval = {self.eval}: must be at least 0")

    def count(self, draw: Draw | None) -> int:
        return self.eval if draw is None else draw.integer(type(self).__name__.lower(), *self.train)

    def shares(self, *, training: bool) -> dict[int, float]:
        """How likely each count is."""
        if not training:
            return {self.eval: 1.0}
        low, high = self.train
        return dict.fromkeys(range(low, high + 1), 1 / (high - low + 1))


@dataclass(frozen=True, kw_only=True)
class Jacobi(Iterations):
    """Refinements between the warm start and the final pass (PonderLM-2, section 3.2)."""

    train: tuple[int, int] = (2, 4)
    eval: int = 3


@dataclass(frozen=True, kw_only=True)
class GaussSeidel(Iterations):
    """Sweeps over the stages after the first."""

    train: tuple[int, int] = (1, 2)
    eval: int = 3
