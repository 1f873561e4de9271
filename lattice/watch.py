"""A rank that waits for another for too long says for which one, and ends.

Each rank writes where it is to `ranks/00003.beat`: how many places it has come to, which all ranks come to in
the same order; whether it is waiting for others; and a count that goes up as long as its process runs. A
rank that has made no progress for the time limit compares: a count that stands still is of a process that is
gone, stopped or cut off; a rank that is behind the others, or alone is not waiting, hangs. Files rather than
messages, since what fails may be the network, and counts rather than times, since clocks differ and jump.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lattice.console import errors
from lattice.rank_log import FOLDER, RankLog
from lattice.world import World

UNLIMITED = ("evaluation", "checkpoint")
"""Places whose time depends on what is evaluated, and on the disk: there only a rank whose process does not
even beat is at fault."""
EXIT = 75
"""Exit status: try again (EX_TEMPFAIL)."""
NOTHING = {"count": 0, "places": 0, "waits": False, "place": "the start"}


class Watch:
    """One rank's beat, and its eye on the others'. Without others it does nothing."""

    def __init__(self, run: Path, world: World, timeout: float, log: RankLog) -> None:
        self._folder, self._world, self._timeout, self._log = run / FOLDER, world, timeout, log
        self._interval = min(1.0, timeout / 10)
        self._step, self._phase, self._places = 0, "start", 0
        self._since = time.monotonic()
        self._count = 0
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._looked: tuple[float, dict[int, dict[str, Any]]] = (-math.inf, {})
        self.give_up: Callable[[int], None] = os._exit

    def at(self, step: int, phase: str) -> None:
        """This rank has come to this part of step `step`."""
        self._places += 1
        self._step, self._phase, self._since = step, phase, time.monotonic()

    def then(self, phase: str) -> None:
        """This rank has come to another part of the same step."""
        self.at(self._step, phase)

    @property
    def place(self) -> str:
        return f"step {self._step} ({self._phase})"

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
            written = self._beat()
            waited = time.monotonic() - self._since
            if self._phase in UNLIMITED:
                if written and self._some_silent():
                    self._end(f"no sign of life for {self._timeout:.0f} s")
                continue
            if waited < self._timeout / 2:
                continue
            if waited >= self._timeout:
                self._end(f"no progress for {waited:.0f} s")
            elif warned != self._since:
                warned = self._since
                self._log.event("stalled", place=self.place, seconds=round(waited, 1), stack=self._stack())

    def _some_silent(self) -> bool:
        """Whether another rank has not beaten for the time limit. All beats are read once in that time."""
        now, (looked, before) = time.monotonic(), self._looked
        if now - looked < self._timeout:
            return False
        after = self._beats()
        self._looked = now, after
        return bool(before) and bool(_silent(before, after, self._world.rank))

    def _beat(self) -> bool:
        """False where it could not be written."""
        self._count += 1
        path = self._folder / f"{self._world.rank:05d}.beat"
        row = {"count": self._count, "places": self._places, "waits": self._waits(), "place": self.place}
        try:
            path.with_suffix(".new").write_text(json.dumps(row), encoding="utf-8")
            path.with_suffix(".new").replace(path)
        except OSError:  # a full disk is for what must be written there to report
            return False
        return True

    def _waits(self) -> bool:
        """Whether the main thread is in an operation of torch.distributed."""
        frame = self._frame()
        return frame is not None and "torch/distributed" in frame.f_code.co_filename

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main)

    def _stack(self) -> list[str]:
        """Where the main thread is, its innermost call last."""
        return [f"{one.filename}:{one.lineno} {one.name}" for one in traceback.extract_stack(self._frame())][
            -8:
        ]

    def _end(self, why: str) -> None:
        before = self._beats()
        for _ in range(3):  # all may be at their end, and whoever does not beat meanwhile is taken for gone
            time.sleep(self._interval)
            self._beat()
        blamed = culprits(before, self._beats(), self._world.rank)
        message = f"{why} in {self.place}: {blamed}"
        self._log.event("fault", error="Timeout", message=message, stack=self._stack())
        errors.print(f"error: rank {self._world.rank}: {message}", markup=False, soft_wrap=True)
        self.give_up(EXIT)

    def _beats(self) -> dict[int, dict[str, Any]]:
        beats = {}
        for rank in range(self._world.size):
            try:
                beats[rank] = json.loads((self._folder / f"{rank:05d}.beat").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                beats[rank] = NOTHING
        return beats


def _silent(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], me: int) -> list[int]:
    return [rank for rank in after if rank != me and after[rank]["count"] == before[rank]["count"]]


def culprits(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], me: int) -> str:
    """Which ranks the others wait for, from what all wrote at two moments."""

    def named(ranks: list[int], what: str) -> str:
        return "; ".join(f"rank {rank} {what} {after[rank]['place']}" for rank in ranks)

    silent = _silent(before, after, me)
    if silent:
        return named(silent, "is stopped, gone or cut off, since")
    first = min(beat["places"] for beat in after.values())
    behind = [rank for rank, beat in after.items() if beat["places"] == first]
    if len(behind) == len(after):
        behind = [rank for rank, beat in after.items() if not beat["waits"]]
    if 0 < len(behind) < len(after):
        return named(behind, "hangs at")
    return "all ranks wait at the same place: for the network, or for different things"
