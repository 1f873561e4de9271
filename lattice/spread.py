"""A model spread over ranks, as the training loop sees it: forward, backward, gradients of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lattice.model import LanguageModel, Output
from lattice.world import World


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a parallel component knows of where it spreads a model."""

    world: World
    device: torch.device
    weights: torch.dtype
    """In which format matrix products take their weights."""
    gathered_fits: bool | None = None
    """Whether a step fits in memory with all weights and gradients there throughout; None if that is unknown."""


class Spread:
    """As it is on one rank. Losses are divided by the targets of all ranks, gradients are summed over them."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        """The forward pass of a training step."""
        output: Output = self.model(*args, **kwargs)
        return output

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward; gradients need to be those of all ranks only after the last."""
        yield

    def finish(self) -> None:
        """After the last backward pass of a step: gradients are those of all ranks, and weights are as the
        optimizer knows them."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, ranks that share no sequences need not call the model alike: for evaluation."""
        yield
