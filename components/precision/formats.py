"""Number formats by autocast: weights and optimizer state stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lattice.protocols import Precision
from lattice.registry import register


@register("precision", "fp32")
@dataclass(frozen=True, kw_only=True)
class Float32(Precision):
    """Everything in float32."""

    def apply(self, model: nn.Module) -> None:
        pass

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()


@register("precision", "bf16")
@dataclass(frozen=True, kw_only=True)
class BFloat16(Precision):
    """Matrix products and attention in bfloat16; weights, gradients and optimizer state in float32."""

    @property
    def weights(self) -> torch.dtype:
        return torch.bfloat16

    def apply(self, model: nn.Module) -> None:
        pass

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16)
