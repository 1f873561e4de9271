"""What happens to each rank of a run, a JSON object a line, in `ranks/00003.jsonl`."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lattice.launch import Elsewhere
from lattice.world import World

FOLDER = "ranks"


class RankLog:
    """A context: it logs that a rank has started, and how it ended. Every line is on the disk at once."""

    def __init__(self, run: Path, world: World) -> None:
        self._path = run / FOLDER / f"{world.rank:05d}.jsonl"
        self._always = {"rank": world.rank, "attempt": world.launch.attempt}
        self._world = world

    def event(self, event: str, **facts: Any) -> None:
        """`time` is that of the host's clock, in seconds since 1970; order is that of the lines."""
        row = {"time": round(time.time(), 3), **self._always, "event": event, **facts}
        # A disk that is full or gone is for those to report who must write to it.
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def __enter__(self) -> RankLog:
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self.event("start", ranks=self._world.size, host=socket.gethostname(), pid=os.getpid())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.event("end")
        elif not isinstance(error, Elsewhere):
            self.event("fault", error=type(error).__name__, message=str(error))
