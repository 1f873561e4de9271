"""Recurrences with one mistake each, to see that the check meant for it says so."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lattice import register
from lattice.components.recurrence.depth import Depth, Repetitions
from lattice.components.recurrence.loop import Loop
from lattice.protocols import Pass, Recurrence, Unroll, Unrolled
from tests.supervised import BothPredict, Supervised


@dataclass(frozen=True, kw_only=True)
class TwoPasses(Recurrence):
    unroll = None

    def passes(self, shape, *, training):
        return [Pass(times=2)]

    def build(self, shape):
        return type(self).unroll(shape)


class Again(nn.Module, Unroll):
    """Right: the hidden state is added to the input, and the layers run again."""

    def __init__(self, shape):
        super().__init__()

    def between(self, hidden_BL1D):
        return hidden_BL1D

    def keys(self, cache, index):
        return None if cache is None else cache.of_pass(index)

    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        token_BL1D = stack.embed(ids_BL).unsqueeze(2)
        hidden_BL1D = self.between(stack.run(token_BL1D, cache=self.keys(cache, 0)))
        return Unrolled(stack.run(token_BL1D + hidden_BL1D, cache=self.keys(cache, 1)).squeeze(2))


def kind(name, base=TwoPasses):
    """Registers a recurrence that builds the class below."""

    def decorate(unroll):
        cls = dataclass(frozen=True, kw_only=True)(
            type(name, (base,), {"unroll": unroll, "__doc__": name, "__module__": __name__})
        )
        register("recurrence", name)(cls)
        return unroll

    return decorate


kind("right")(Again)


@kind("future_leak")
class FutureLeak(Again):
    def between(self, hidden_BL1D):
        return hidden_BL1D + 0.1 * hidden_BL1D.mean(dim=1, keepdim=True)


@kind("wrong_positions")
class WrongPositions(Again):
    def between(self, hidden_BL1D):
        return (
            hidden_BL1D
            * torch.linspace(1, 2, 64, dtype=hidden_BL1D.dtype)[: hidden_BL1D.shape[1], None, None]
        )


@kind("wrong_stages")
class WrongStages(Again):
    def step(self, stack, ids_B1, cache):
        """Decodes with one pass, where training has two."""
        return stack.run(stack.embed(ids_B1).unsqueeze(2), cache=cache).squeeze(2)


@kind("stale_cache")
class StaleCache(Again):
    def keys(self, cache, index):
        return cache


@kind("undeclared_pass")
class UndeclaredPass(Again):
    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        if draw is not None:
            stack.run(stack.embed(ids_BL).unsqueeze(2))
        return super().forward(stack, ids_BL, draw=draw, cache=cache)


@kind("global_random")
class GlobalRandom(Again):
    def between(self, hidden_BL1D):
        return hidden_BL1D * torch.rand(()).item()


@kind("idle_parameter")
class IdleParameter(Again):
    def __init__(self, shape):
        super().__init__(shape)
        self.idle = nn.Parameter(torch.ones(3))


@kind("carried_state")
class CarriedState(Again):
    """Causal, but past the mask: a sum over earlier tokens of the row."""

    def between(self, hidden_BL1D):
        return hidden_BL1D.cumsum(dim=1)


@kind("hidden_weight")
class HiddenWeight(Again):
    """A tensor that no state dict holds."""

    def __init__(self, shape):
        super().__init__(shape)
        self.weight = torch.randn(shape.hidden_size, dtype=torch.float64)

    def between(self, hidden_BL1D):
        return hidden_BL1D * self.weight


@kind("wrong_shape")
class WrongShape(Again):
    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        return Unrolled(super().forward(stack, ids_BL, draw=draw, cache=cache).hidden_BLD[:, :, None])


@register("recurrence", "unsaid_stop")
@dataclass(frozen=True, kw_only=True)
class UnsaidStop(Depth):
    """Stops when a whole row has converged, and lets rows branch nevertheless."""

    tolerance: float | None = 1e-3
    repetitions: Repetitions = field(default_factory=lambda: Repetitions(train=(1, 2), eval=12))
    rows_may_branch = True


@register("recurrence", "stop_at_once")
@dataclass(frozen=True, kw_only=True)
class StopAtOnce(Depth):
    """With a tolerance, stops after one repetition, however much the state has changed."""

    tolerance: float | None = 1e-3

    def build(self, shape):
        once = replace(self, repetitions=Repetitions(train=self.repetitions.train, eval=1))
        return super().build(shape) if self.tolerance is None else Depth.build(once, shape)


@dataclass(frozen=True, kw_only=True)
class Tolerant(TwoPasses):
    tolerance: float | None = 0.05
    rows_may_branch = False


@kind("tolerated_leak", Tolerant)
class ToleratedLeak(FutureLeak):
    """By less than a hundred tolerances."""


class Drawn(Again):
    """Notes whether this is a training step, and whether a late one."""

    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        self.drawn = draw is not None
        self.late = self.drawn and draw.step > 1000
        return super().forward(stack, ids_BL, draw=draw, cache=cache)


@kind("drawn_future_leak")
class DrawnFutureLeak(Drawn):
    def between(self, hidden_BL1D):
        return hidden_BL1D + 0.1 * hidden_BL1D.mean(dim=1, keepdim=True) if self.drawn else hidden_BL1D


@kind("drawn_rows_mixed")
class DrawnRowsMixed(Drawn):
    def between(self, hidden_BL1D):
        return hidden_BL1D + 0.1 * hidden_BL1D.mean(dim=0, keepdim=True) if self.drawn else hidden_BL1D


@kind("drawn_carried_state")
class DrawnCarriedState(Drawn):
    def between(self, hidden_BL1D):
        return hidden_BL1D.cumsum(dim=1) if self.drawn else hidden_BL1D


@kind("chunk_leak")
class ChunkLeak(Again):
    """Of whole chunks of eight tokens alone."""

    def between(self, hidden_BL1D):
        chunks = hidden_BL1D[:, : hidden_BL1D.shape[1] // 8 * 8].unflatten(1, (-1, 8))
        means_BL1D = chunks.mean(dim=2, keepdim=True).expand_as(chunks).flatten(1, 2)
        return torch.cat([means_BL1D, hidden_BL1D[:, means_BL1D.shape[1] :]], dim=1)


@kind("late_leak")
class LateLeak(Drawn):
    def between(self, hidden_BL1D):
        return hidden_BL1D.roll(-1, 1) if self.late else hidden_BL1D


@kind("late_carried_state")
class LateCarriedState(Drawn):
    def between(self, hidden_BL1D):
        return hidden_BL1D.cumsum(dim=1) if self.late else hidden_BL1D


@register("recurrence", "token_leak")
@dataclass(frozen=True, kw_only=True)
class AtToken(TwoPasses):
    """Wrong only in training, and only at one token, or ahead of it."""

    token: int = 10
    ahead: int = 1

    def build(self, shape):
        return TokenLeak(self)


class TokenLeak(Drawn):
    def __init__(self, options):
        super().__init__(None)
        self.options = options

    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        self.here_BL = (ids_BL == self.options.token).roll(-self.options.ahead, 1)
        return super().forward(stack, ids_BL, draw=draw, cache=cache)

    def between(self, hidden_BL1D):
        leak_BL11 = (self.here_BL & self.drawn)[..., None, None]
        return torch.where(leak_BL11, hidden_BL1D.roll(-1, 1), hidden_BL1D)


class AfterToken(Again):
    """A stop: from there on something is added to what enters the second pass."""

    token = 20

    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        self.stop_BL11 = (ids_BL == self.token)[..., None, None]
        return super().forward(stack, ids_BL, draw=draw, cache=cache)


@kind("token_carried_state")
class TokenCarriedState(AfterToken):
    def between(self, hidden_BL1D):
        return hidden_BL1D * self.stop_BL11.cumsum(dim=1)


@kind("token_gate")
class TokenGate(AfterToken):
    """Right: a parameter that acts at one token alone."""

    def __init__(self, shape):
        super().__init__(shape)
        self.gate_D = nn.Parameter(torch.ones(shape.hidden_size))

    def between(self, hidden_BL1D):
        return torch.where(self.stop_BL11, self.gate_D * hidden_BL1D, hidden_BL1D)


@dataclass(frozen=True, kw_only=True)
class UnsaidSweeps(Recurrence):
    """Right, but nothing says how to iterate further: one thought, found by sweeps over all tokens."""

    sweeps: int = 2
    slots = 2
    parallel_is_exact = False

    def passes(self, shape, *, training):
        return [Pass(), Pass(stages=2, times=self.sweeps - 1), Pass(stages=2, read=1)]

    def decode_passes(self, shape):
        return [Pass(keys=2), Pass(keys=2)]

    def build(self, shape):
        return type(self).unroll(self.sweeps)


@kind("unsaid_sweeps", UnsaidSweeps)
class Sweeping(Unroll):
    scale = 1

    def __init__(self, sweeps):
        self.sweeps = sweeps

    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        token_BL1D = stack.embed(ids_BL).unsqueeze(2)
        thought_BL1D = stack.run(token_BL1D)
        for _ in range(self.sweeps - 1):
            thought_BL1D = stack.run(token_BL1D, thought_BL1D)[:, :, :1]
        hidden_BL1D = stack.run(token_BL1D, thought_BL1D, read=slice(-1, None), cache=cache)
        return Unrolled(hidden_BL1D.squeeze(2))

    def step(self, stack, ids_B1, cache):
        thought_B11D = self.scale * stack.run(stack.embed(ids_B1).unsqueeze(2), cache=cache)
        return stack.run(thought_B11D, first_stage=1, cache=cache).squeeze(2)


@dataclass(frozen=True, kw_only=True)
class Sweeps(UnsaidSweeps):
    def with_iterations(self, count):
        return replace(self, sweeps=count)


kind("sweeps", Sweeps)(Sweeping)


@kind("wrong_sweeps", Sweeps)
class WrongSweeping(Sweeping):
    scale = 2


@kind("no_gradients")
class NoGradients(Again):
    """Of the first pass, which is not declared."""

    def between(self, hidden_BL1D):
        return hidden_BL1D.detach()


@dataclass(frozen=True, kw_only=True)
class UndeclaredStep(TwoPasses):
    def decode_passes(self, shape):
        return [Pass()]


kind("undeclared_step", UndeclaredStep)(Again)


@kind("undeclared_product")
class UndeclaredProduct(Again):
    """One D x D product between the passes: 1.5 % of all."""

    def __init__(self, shape):
        super().__init__(shape)
        self.gate = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def between(self, hidden_BL1D):
        return self.gate(hidden_BL1D)


@register("recurrence", "drawn_product")
@dataclass(frozen=True, kw_only=True)
class SometimesGated(TwoPasses):
    """Right where the product is declared for half of the training steps."""

    declared: float = 0.5

    def passes(self, shape, *, training):
        product = 2 * shape.hidden_size**2
        return [Pass(times=2), Pass(layers=0, times=self.declared if training else 1, operations=product)]

    def build(self, shape):
        return DrawnProduct(shape)


class DrawnProduct(UndeclaredProduct):
    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        self.gated = draw is None or draw.uniform("gate") < 0.5
        return super().forward(stack, ids_BL, draw=draw, cache=cache)

    def between(self, hidden_BL1D):
        return super().between(hidden_BL1D) if self.gated else hidden_BL1D


@kind("uncached")
class Uncached(Again):
    def keys(self, cache, index):
        return None


@kind("read_one")
class ReadOne(Again):
    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        return Unrolled(stack.run(stack.embed(ids_BL).unsqueeze(2), read=-1, cache=cache).squeeze(2))


@kind("logged_matrix")
class LoggedMatrix(Again):
    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        unrolled = super().forward(stack, ids_BL, draw=draw, cache=cache)
        return unrolled if draw is None else replace(unrolled, telemetry={"gate": torch.eye(2)})


class Penalized(Again):
    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        unrolled = super().forward(stack, ids_BL, draw=draw, cache=cache)
        return replace(unrolled, penalty_BL=self.penalty(unrolled.hidden_BLD.square().mean(-1)))


@kind("penalty_leak")
class PenaltyLeak(Penalized):
    def penalty(self, size_BL):
        return size_BL.flip(1)


@kind("penalty_rows_mixed")
class PenaltyRowsMixed(Penalized):
    def penalty(self, size_BL):
        return size_BL - size_BL.mean(0)


@kind("penalty_random")
class PenaltyRandom(Penalized):
    def penalty(self, size_BL):
        return size_BL * torch.rand(())


@kind("supervision_leak")
class SupervisionLeak(BothPredict):
    def __init__(self, shape):
        super().__init__(Supervised())

    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        unrolled = super().__call__(stack, ids_BL, draw=draw, cache=cache)
        (first_BLD, weight), *_ = unrolled.also_predict
        return replace(unrolled, also_predict=[(first_BLD.roll(-1, 1), weight)])


@register("recurrence", "deaf_to_count")
@dataclass(frozen=True, kw_only=True)
class DeafToCount(Loop):
    def with_thoughts(self, count):
        return self


@register("recurrence", "counts_on")
@dataclass(frozen=True, kw_only=True)
class CountsOn(Loop):
    def with_thoughts(self, count):
        return replace(self, loops=self.loops + count)


@register("recurrence", "counts_backwards")
@dataclass(frozen=True, kw_only=True)
class CountsBackwards(Loop):
    def with_thoughts(self, count):
        return replace(self, loops=10 - count)
