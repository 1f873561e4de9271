"""When an iteration has converged: the relative change of a state, for the log and for each row.

Shapes: B batch, L tokens, n stages a token, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lattice.stack import Stack


class Convergence:
    """Watches an iteration. With a `tolerance`, rows whose state changes by less are done: what they have is
    kept, so that a row of a batch gets what it gets alone."""

    def __init__(self, stack: Stack, tolerance: float | None) -> None:
        self._real_BL = stack.real_BL
        self._row_norms = stack.row_norms
        self._tolerance = tolerance
        self._residuals: list[Tensor] = []
        self._done_B: Tensor | None = None

    @property
    def done_B(self) -> Tensor | None:
        """The rows that are done; None as long as none can be."""
        return self._done_B

    def kept(self, before: Tensor, after: Tensor) -> Tensor:
        """`before` (B, …) in rows that are done, `after` in the others."""
        if self._done_B is None:
            return after
        done: Tensor = self._done_B.view(-1, *[1] * (after.dim() - 1))
        return torch.where(done, before, after)

    @torch.no_grad()
    def watch(self, before_BLnD: Tensor, after_BLnD: Tensor) -> bool:
        """Notes the change of one iteration; True when every row is done."""
        change_B, size_B = self._norm(after_BLnD - before_BLnD), self._norm(after_BLnD)
        # A mean over rows, so that what is measured on the parts of a batch averages to the batch's.
        self._residuals.append((change_B / size_B.clamp(min=1e-30)).mean())
        if self._tolerance is None:
            return False
        done_B = change_B <= self._tolerance * size_B
        self._done_B = done_B if self._done_B is None else self._done_B | done_B
        return bool(self._done_B.all())

    def _norm(self, x_BLnD: Tensor) -> Tensor:
        """(B,), in float32 at least, over real tokens."""
        x_BLnD = x_BLnD.to(torch.promote_types(x_BLnD.dtype, torch.float32))
        if self._real_BL is not None:
            x_BLnD = x_BLnD * self._real_BL[:, :, None, None]
        return self._row_norms(torch.linalg.vector_norm(x_BLnD, dim=(1, 2, 3)))

    @property
    def telemetry(self) -> dict[str, Tensor]:
        """`residuals`: norm of the change over the norm, in the mean over rows, at each iteration."""
        return {"residuals": torch.stack(self._residuals)} if self._residuals else {}


def check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and tolerance <= 0:
        raise ValueError(f"tolerance = {tolerance}: must be greater than 0")


def check_grad_passes(grad_passes: int | None) -> None:
    if grad_passes is not None and grad_passes < 1:
        raise ValueError(f"grad_passes = {grad_passes}: must be at least 1")


def gradients(index: int, total: int, grad_passes: int | None) -> torch.set_grad_enabled:
    """Context of iteration `index` of `total`: gradients flow through the last `grad_passes` alone."""
    within = grad_passes is None or index >= total - grad_passes
    return torch.set_grad_enabled(torch.is_grad_enabled() and within)
