"""Everything the backward pass needs is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lattice.protocols import ActivationCheckpoint
from lattice.registry import register

T = TypeVar("T")


@register("activation_checkpoint", "none")
@dataclass(frozen=True, kw_only=True)
class KeepAll(ActivationCheckpoint):
    """Keeps all activations: fastest, and the most memory."""

    def block(self, call: Callable[..., T]) -> Callable[..., T]:
        return call

    def whole_pass(self, call: Callable[..., T]) -> Callable[..., T]:
        return call
