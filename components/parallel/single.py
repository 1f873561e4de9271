"""One process, one device."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from lattice.protocols import Parallel
from lattice.registry import register


@register("parallel", "single")
@dataclass(frozen=True, kw_only=True)
class Single(Parallel):
    """One process on one device."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1:
            raise ValueError(
                f"parallel.kind = 'single' was launched with {launched} processes, which would all train "
                "the same model: launch one"
            )
        return 1

    def apply(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model.to(device)
