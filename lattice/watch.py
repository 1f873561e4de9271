"""A rank that waits for another for too long says for which one, and ends.

Each rank writes where it is to `ranks/00003.beat`, and a count that goes up as long as its process runs. A
rank that has made no progress for the time limit compares: a count that stands still is of a process that is
gone, stopped or cut off; one that goes on behind the others is of a rank that hangs. Files rather than
messages, since what fails may be the network, and counts rather than times, since clocks differ and jump.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lattice.console import errors
from lattice.rank_log import FOLDER, RankLog
from lattice.world import World

PHASES = ("data", "passes", "update", "log", "evaluation", "checkpoint")
"""Of a step, in their order."""
UNLIMITED = ("evaluation", "checkpoint")
"""Whose time depends on what is evaluated, and on the disk."""
EXIT = 75
"""Exit status: try again (EX_TEMPFAIL)."""


class Watch:
    """One rank's beat, and its eye on the others'. Without others it does nothing."""

    def __init__(self, run: Path, world: World, timeout: float, log: RankLog) -> None:
        self._folder, self._world, self._timeout, self._log = run / FOLDER, world, timeout, log
        self._interval = min(1.0, timeout / 10)
        self._step, self._phase = 0, PHASES[0]
        self._since = time.monotonic()
        self._count = 0
        self._stop = threading.Event()
        self.give_up: Callable[[int], None] = os._exit

    def at(self, step: int, phase: str) -> None:
        """This rank has come to this phase of step `step`."""
        self._step, self._phase, self._since = step, phase, time.monotonic()

    @contextmanager
    def on(self) -> Iterator[Watch]:
        """Watches within."""
        if self._world.size == 1:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._since = time.monotonic()
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        warned = 0.0
        while not self._stop.wait(self._interval):
            self._beat()
            waited = time.monotonic() - self._since
            if self._phase in UNLIMITED or waited < self._timeout / 2:
                continue
            if waited >= self._timeout:
                self._end(waited)
            elif warned != self._since:
                warned = self._since
                self._log.event("stalled", step=self._step, phase=self._phase, seconds=round(waited, 1))

    def _beat(self) -> None:
        self._count += 1
        path = self._folder / f"{self._world.rank:05d}.beat"
        row = {"count": self._count, "step": self._step, "phase": self._phase}
        try:
            path.with_suffix(".new").write_text(json.dumps(row), encoding="utf-8")
            path.with_suffix(".new").replace(path)
        except OSError:  # a full disk is for what must be written there to report
            return

    def _end(self, waited: float) -> None:
        before = self._beats()
        time.sleep(3 * self._interval)
        self._beat()
        blamed = culprits(before, self._beats(), self._world.rank)
        message = f"no progress for {waited:.0f} s in step {self._step} ({self._phase}): {blamed}"
        self._log.event("fault", error="Timeout", message=message, step=self._step, phase=self._phase)
        errors.print(f"error: rank {self._world.rank}: {message}", markup=False, soft_wrap=True)
        self.give_up(EXIT)

    def _beats(self) -> dict[int, dict[str, Any]]:
        beats = {}
        for rank in range(self._world.size):
            try:
                beats[rank] = json.loads((self._folder / f"{rank:05d}.beat").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                beats[rank] = {"count": 0, "step": 0, "phase": PHASES[0]}
        return beats


def culprits(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], me: int) -> str:
    """Which ranks the others wait for, from what all wrote at two moments."""
    silent = [rank for rank in after if rank != me and after[rank]["count"] == before[rank]["count"]]
    if silent:
        return "; ".join(
            f"rank {rank} is stopped, gone or cut off, since {_place(after[rank])}" for rank in silent
        )
    places = {rank: (beat["step"], PHASES.index(beat["phase"])) for rank, beat in after.items()}
    first = min(places.values())
    behind = [rank for rank, place in places.items() if place == first]
    if len(behind) == len(places):
        return (
            f"all ranks wait at the same place, {_place(after[me])}: for the network, or for different things"
        )
    return "; ".join(f"rank {rank} hangs at {_place(after[rank])}" for rank in behind)


def _place(beat: dict[str, Any]) -> str:
    return f"step {beat['step']} ({beat['phase']})"
