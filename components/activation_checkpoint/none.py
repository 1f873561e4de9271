"""Everything the backward pass needs is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lattice.protocols import ActivationCheckpoint
from lattice.registry import register


@register("activation_checkpoint", "none")
@dataclass(frozen=True, kw_only=True)
class KeepAll(ActivationCheckpoint):
    """Keeps all activations: fastest, and the most memory."""

    def block(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return call

    def whole_pass(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return call
