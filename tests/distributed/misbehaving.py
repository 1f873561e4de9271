"""A recurrence that does to one rank, in one step of the first attempt, what machines and users do."""

import os
import signal
import time
from dataclasses import dataclass, replace

from lattice.components.data.embedded import Embedded
from lattice.components.recurrence.none import NoRecurrence, OnePass
from lattice.launch import Launch
from lattice.protocols import Unrolled
from lattice.registry import register


@register("recurrence", "test_misbehaving")
@dataclass(frozen=True, kw_only=True)
class Misbehaving(NoRecurrence):
    what: str
    rank: int = 1
    step: int = 3

    def build(self, shape):
        return Pass(self)


@register("data", "test_of_rank")
@dataclass(frozen=True, kw_only=True)
class OfRank(Embedded):
    """Other text on each rank, as where one host's copy is of another day."""

    def open(self, request):
        return Embedded.open(replace(self, megabytes=self.megabytes + Launch.here().rank / 2), request)


class Pass(OnePass):
    def __init__(self, options):
        self.options = options

    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        options, launch = self.options, Launch.here()
        unrolled = super().__call__(stack, ids_BL, draw=draw, cache=cache)
        if draw is None or (launch.rank, draw.step + 1, launch.attempt) != (options.rank, options.step, 0):
            return unrolled
        if options.what == "nan":
            return Unrolled(unrolled.hidden_BLD * float("nan"))
        if options.what == "more_passes":
            return super().__call__(stack, ids_BL, draw=draw, cache=cache)
        if options.what == "hang":
            time.sleep(1000)
        os.kill(os.getpid(), getattr(signal, options.what))
        return unrolled
