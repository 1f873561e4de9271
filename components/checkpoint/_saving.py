"""A save in flight, and when its failure surfaces."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from lattice.components.checkpoint._ranks import Ranks


class Saving:
    """One save, from its start until its outcome has been seen.

    Ranks learn of a failure at different moments, and one that raised a step before the others would leave
    them waiting for it in the middle of the next step. So they agree, once it has failed, on the poll at
    which all raise: the one after the last that any rank has begun.
    """

    def __init__(self) -> None:
        self.outcome: Future[None] = Future()
        self._lock = threading.Lock()
        self._polls = 0
        self._due: int | None = None

    def poll(self) -> bool:
        """Whether the failure surfaces now."""
        with self._lock:
            self._polls += 1
            return self._due is not None and self._polls >= self._due

    def fail(self, ranks: Ranks, error: OSError) -> None:
        """In the thread that saves, on all ranks. Polls wait while the ranks agree; none is late for that, as
        all have just heard of the failure."""
        with self._lock:
            try:
                begun = ranks.gather(self._polls)
            except OSError:  # a rank is gone, and the job with it
                begun = [self._polls]
            self._due = max(begun) + 1
        self.outcome.set_exception(error)
