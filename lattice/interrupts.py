"""SIGINT, SIGTERM and SIGHUP as a request that the loop answers between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGHUP (its terminal is closed) sets `received`; a
    second SIGINT interrupts at once. SIGHUP stays ignored under nohup. In forked children signals mean what
    they meant before: whoever ends a worker that only noted its SIGTERM would wait for it for ever."""

    received: str | None = None

    @property
    def number(self) -> int:
        """Of the signal; 0 if there was none."""
        return 0 if self.received is None else signal.Signals[self.received].value

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread alone; elsewhere signals keep their meaning.
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
            for number in (signal.SIGINT, signal.SIGTERM, *hangup):
                self._before[number] = signal.signal(number, self._note)
            _entered.append(self)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in _entered:
            _entered.remove(self)
            for number, handler in self._before.items():
                signal.signal(number, handler)


_entered: list[StopRequest] = []
"""Of this process, the innermost last."""
_forking = threading.local()


def _before_fork() -> None:
    # A signal to a child whose handlers are not yet put back would be lost: it waits until they are.
    held = _entered[-1]._before if _entered else ()
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, held)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    while _entered:
        _entered[-1].__exit__(None, None, None)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
