"""A model spread over ranks, as the training loop sees it: forward, backward, gradients of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lattice.model import LanguageModel, Output
from lattice.split import Split
from lattice.world import World


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a parallel component knows of where it spreads a model."""

    world: World
    device: torch.device
    weights: torch.dtype
    """In which format matrix products take their weights."""
    gathered_fits: bool | None = None
    """Whether a step fits in memory with all weights and gradients there throughout; None if unknown."""


class Spread:
    """As it is on one rank. Losses are divided by the targets of all ranks, so that gradients are summed."""

    copies = 1
    """How many ranks compute the same loss; that of the others is of other targets."""

    def __init__(self, model: LanguageModel, split: Split | None = None) -> None:
        """`split`: how ranks share a sequence in training, if they do."""
        self.model = model
        self.model.split = self._split = split

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
        """For evaluation. Within, no rank needs the others, except where a layer is divided among them."""
        self.model.split = None
        yield
        self.model.split = self._split
