"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lattice.console import errors, plural
from lattice.prepare_encoding import Document

LINE_SECONDS = 30.0
BAR_SECONDS = 0.2


@contextmanager
def progress(show: bool, sources: Sequence[str]) -> Iterator[Callable[[Document], None]]:
    """A function to call with each document; counts are of this run."""
    if not show:
        yield lambda document: None
    elif errors.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=errors) as bar:
            task = bar.add_task("reading")
            counter = _Counter(sources, BAR_SECONDS, lambda text: bar.update(task, description=text))
            yield counter.add
            bar.update(task, description=counter.text())
    else:
        counter = _Counter(sources, LINE_SECONDS, lambda text: errors.print(text, soft_wrap=True))
        yield counter.add
        errors.print(counter.text(), soft_wrap=True)


class _Counter:
    def __init__(self, sources: Sequence[str], seconds: float, show: Callable[[str], None]) -> None:
        self._sources = sources
        self._seconds = seconds
        self._show = show
        self._start = self._shown = time.monotonic()
        self._documents = self._bytes = self._tokens = self._source = 0

    def add(self, document: Document) -> None:
        self._documents += 1
        self._bytes += document.bytes
        self._tokens += len(document.ids)
        self._source = document.place.source
        now = time.monotonic()
        if now - self._shown >= self._seconds:
            self._shown = now
            self._show(self.text())

    def text(self) -> str:
        rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
        return (
            f"source {self._source + 1} of {len(self._sources)}: {plural(self._documents, 'document')}, "
            f"{self._bytes / 1e6:,.1f} MB, {plural(self._tokens, 'token')}, {rate:,.0f} tokens/s"
        )
