"""SIGINT, SIGTERM and SIGHUP as a request that the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGHUP (its terminal is closed) sets `received`; a
    second SIGINT interrupts at once. SIGHUP stays ignored under nohup."""

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
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
