"""Depth recurrence: a core of layers repeated, between a prelude and a coda that run once.

"Scaling up test-time compute with latent reasoning" (Huginn, Geiping et al., arXiv 2502.05171): the prelude's
output is injected into the state before every repetition, the number of repetitions is drawn while training,
gradients flow through the last ones alone, and at inference a token may stop when its state has converged.

Shapes: B batch, L tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lattice.cache import KVCache
from lattice.components.recurrence._convergence import (
    Convergence,
    check_grad_passes,
    check_tolerance,
    gradients,
)
from lattice.components.recurrence._iterations import Iterations
from lattice.components.recurrence._scale import check_embed_scale
from lattice.draws import Draw
from lattice.linear import Linear
from lattice.protocols import Initialization, Pass, Recurrence, Shape, Unroll, Unrolled
from lattice.registry import register
from lattice.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Repetitions(Iterations):
    """Times that the core runs."""

    train: tuple[int, int] = (1, 8)
    eval: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train[0] < 1:
            raise ValueError(f"train = {list(self.train)}: must be a range [low, high] with 1 <= low <= high")
        if self.eval < 1:
            raise ValueError(f"eval = {self.eval}: must be at least 1")


@register("recurrence", "depth")
@dataclass(frozen=True, kw_only=True)
class Depth(Recurrence):
    """Prelude, repeated core and coda, with the prelude's output injected again each time (Huginn)."""

    prelude: int = 1
    """Layers that run once, before the core."""
    coda: int = 1
    """Layers that run once, after the core."""
    repetitions: Repetitions = field(default_factory=Repetitions)
    """Of the core, the layers in between."""
    inject: Literal["add", "concat"] = "add"
    """How the prelude's output enters the state: as a sum, or through a learned map of both side by side."""
    normalize: bool = True
    """Whether the state goes through the final norm after each repetition; without, it may grow."""
    grad_passes: int | None = None
    """Gradients flow through the last n repetitions alone; through all if not given."""
    tolerance: float | None = None
    """At evaluation, stop when the state changes by less, relatively; `eval` is then a limit."""
    embed_scale: float | None = None
    """Multiplier of the token embeddings; sqrt(2.5 D) if not given."""

    def __post_init__(self) -> None:
        for name in ("prelude", "coda"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")
        check_grad_passes(self.grad_passes)
        check_tolerance(self.tolerance)
        check_embed_scale(self.embed_scale)

    @property
    def parallel_is_exact(self) -> bool:
        return self.tolerance is None

    @property
    def rows_may_branch(self) -> bool:
        return self.tolerance is None

    def passes(self, shape: Shape, *, training: bool) -> list[Pass]:
        core = shape.num_layers - self.prelude - self.coda
        inject = 4 * shape.hidden_size**2 if self.inject == "concat" else 0
        passes = [Pass(layers=self.prelude), Pass(layers=self.coda)]
        for count, share in self.repetitions.shares(training=training).items():
            with_gradients = count if self.grad_passes is None else min(count, self.grad_passes)
            for times, back in ((with_gradients, True), (count - with_gradients, False)):
                repeated = Pass(layers=core, times=share * times, gradients=back, operations=inject)
                passes.append(repeated)
        return passes

    def with_thoughts(self, count: int) -> Recurrence:
        if count < 1:
            raise ValueError(f"thoughts = {count}: recurrence 'depth' runs its core at least once")
        return dataclasses.replace(self, repetitions=Repetitions(train=(count, count), eval=count))

    def initialization(self, shape: Shape) -> Initialization:
        return Initialization.scaled(shape, 1)

    def embedding_scale(self, shape: Shape) -> float:
        return self.embed_scale or math.sqrt(2.5 * shape.hidden_size)

    def build(self, shape: Shape) -> Unroll:
        if self.prelude + self.coda >= shape.num_layers:
            raise ValueError(
                f"prelude = {self.prelude}: with coda = {self.coda} leaves none of the {shape.num_layers} "
                "layers to repeat; together they must be fewer"
            )
        return Repeating(self, shape)


class Repeating(nn.Module, Unroll):
    def __init__(self, options: Depth, shape: Shape) -> None:
        super().__init__()
        self.options = options
        self.core = (options.prelude, shape.num_layers - options.coda)
        self.scale = options.embedding_scale(shape)
        self.adapter: nn.Linear | None = None
        if options.inject == "concat":
            size = shape.hidden_size
            self.adapter = Linear(2 * size, size, bias=False)
            with torch.no_grad():  # begins as the sum
                self.adapter.weight.copy_(torch.eye(size).repeat(1, 2))

    def forward(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        start, stop = self.core
        embedded_BL1D = (stack.embed(ids_BL) * self.scale).unsqueeze(2)
        prelude_BL1D = stack.run(embedded_BL1D, stop=start, norm=False, cache=cache)
        state_BL1D, telemetry = self._repeat(stack, prelude_BL1D, draw, cache)
        hidden_BL1D = stack.run(state_BL1D, start=stop, cache=cache)
        return Unrolled(hidden_BL1D.squeeze(2), telemetry)

    def _repeat(
        self, stack: Stack, prelude_BL1D: Tensor, draw: Draw | None, cache: KVCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options, (start, stop) = self.options, self.core
        total = options.repetitions.count(draw)
        convergence = Convergence(stack, options.tolerance if draw is None else None)
        state_BL1D = torch.zeros_like(prelude_BL1D)
        converged = False
        for index in range(total):
            keys = None if cache is None else cache.of_pass(index)
            if cache is not None and keys is not None and convergence.done_B is not None:
                # What later tokens see of a row that is done are the keys of its last repetition.
                keys.repeat(cache.of_pass(index - 1), stack.segment(1), start, stop)
                keys.hold(convergence.done_B)
            if converged:
                continue  # nothing is computed; later tokens still find this one at every repetition
            with gradients(index, total, options.grad_passes):
                input_BL1D = self._inject(state_BL1D, prelude_BL1D)
                after_BL1D = stack.run(input_BL1D, start=start, stop=stop, norm=options.normalize, cache=keys)
                after_BL1D = convergence.kept(state_BL1D, after_BL1D)
            if keys is not None:
                keys.hold(None)
            converged = convergence.watch(state_BL1D, after_BL1D)
            state_BL1D = after_BL1D
        return state_BL1D, convergence.telemetry

    def _inject(self, state_BL1D: Tensor, prelude_BL1D: Tensor) -> Tensor:
        if self.adapter is None:
            return state_BL1D + prelude_BL1D
        injected: Tensor = self.adapter(torch.cat([state_BL1D, prelude_BL1D], dim=-1))
        return injected.to(prelude_BL1D.dtype)  # the residual stream keeps its precision under autocast
