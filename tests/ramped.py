"""A recurrence that thinks more and more in the course of a training, written as a user would."""

import dataclasses
from dataclasses import dataclass

from lattice import register
from lattice.protocols import Pass, Recurrence, Unroll, Unrolled


@register("recurrence", "test_ramped")
@dataclass(frozen=True, kw_only=True)
class Ramped(Recurrence):
    """Passes over the hidden states: one, and after every `every` steps another, up to `most`."""

    every: int = 4
    most: int = 3

    def count(self, step):
        return min(self.most, 1 + step // self.every)

    def passes(self, shape, *, training):
        return [Pass(times=self.most)]

    def passes_at(self, shape, step):
        return [Pass(times=self.count(step))]

    def with_thoughts(self, count):
        return dataclasses.replace(self, most=count + 1)

    def build(self, shape):
        return Ramping(self)


class Ramping(Unroll):
    def __init__(self, options):
        self.options = options

    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        count = self.options.most if draw is None else self.options.count(draw.step)
        token_BL1D = stack.embed(ids_BL).unsqueeze(2)
        hidden_BL1D = stack.run(token_BL1D, cache=cache)
        for index in range(1, count):
            keys = None if cache is None else cache.of_pass(index)
            hidden_BL1D = stack.run(token_BL1D + hidden_BL1D, cache=keys)
        return Unrolled(hidden_BL1D.squeeze(2))
