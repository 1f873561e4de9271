"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

WIDE = 120
"""Columns of a table that is not on a terminal, at most."""


class _Output(Console):
    """Shows while its stream lasts: once a pipe or a terminal is closed, or the disk under a file full, it is
    quiet. What is only shown ends nothing that is computed."""

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)  # writes
        except OSError as error:
            self.on_broken_pipe()
            if not isinstance(error, BrokenPipeError):
                warn(f"stdout cannot be written: {error.strerror or error}: nothing more is shown")

    def on_broken_pipe(self) -> None:
        """In place of the exit that rich has for it. What is left in the buffer, and what others print, goes
        where it does not fail."""
        self.quiet = True
        with suppress(OSError), open(os.devnull, "w") as nowhere:  # not every stream has a descriptor
            os.dup2(nowhere.fileno(), self.file.fileno())


console = _Output(highlight=False)
errors = _Output(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line as it is, whatever brackets it holds."""
    console.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """A line on stderr, likewise, of what goes on all the same."""
    errors.print(f"warning: {text}", markup=False, soft_wrap=True)


def check_shown() -> None:
    """Ends the process with exit code 1 where stdout did not last: for commands that do nothing but show."""
    if console.quiet:
        sys.exit(1)


def plural(count: int, noun: str) -> str:
    """A number of things: 1 token, 2 tokens."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def only_first(rank: int) -> Iterator[None]:
    """Within, ranks other than the first show nothing but errors."""
    before, console.quiet = console.quiet, console.quiet or rank > 0
    try:
        yield
    finally:
        console.quiet = before


class _Figures(TextColumn):
    """One line that is cut at its end where the terminal is narrow: a column that may wrap gives way, so that
    the times behind it do not."""

    def render(self, task: Task) -> Text:
        figures = super().render(task)
        figures.no_wrap, figures.overflow = True, "ellipsis"
        return figures


class Training:
    """Shows steps as they are done; a context manager around the loop."""

    def __init__(self, first: int, steps: int, log_every: int) -> None:
        self._first, self._steps, self._log_every = first, steps, log_every
        self._validation = ""
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            *([BarColumn(bar_width=16)] if console.width >= 100 else []),
            _Figures("{task.fields[shown]}", table_column=Column()),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=first, shown="")

    def __enter__(self) -> Training:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, row: dict[str, Any]) -> None:
        """`row` as in metrics.jsonl."""
        shown = f"loss {row['loss']:.4f}{self._validation}  {row['tokens_per_second']:,.0f} tok/s"
        self._progress.update(self._task, completed=row["step"], shown=shown)
        done = row["step"]
        if not console.is_terminal and (
            done % self._log_every == 0 or done in (self._first + 1, self._steps)
        ):
            residuals = "".join(f" {value:.1e}" for value in row.get("residuals", []))
            thinking = f"  residuals{residuals}" if residuals else ""
            say(f"step {done}/{self._steps}  {shown}  lr {row['lr']:.2e}{thinking}")

    def evaluation(self, name: str, step: int, values: dict[str, float | str]) -> None:
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        if "loss" in numbers:
            self._validation = f"  {name} {numbers['loss']:.4f}"
        if numbers:
            shown = (f"{key.replace('_', ' ')} {value:.4f}" for key, value in numbers.items())
            say(f"step {step}  {name}: " + "  ".join(shown))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table of plain text."""
    shown = Table(header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    # A file or a pipe has no width: there a table is as wide as it needs.
    target = (
        console
        if console.is_terminal
        else _Output(file=console.file, width=WIDE, highlight=False, quiet=console.quiet)
    )
    # As a line of its own: the title of a Table wraps at its width.
    target.print(title, style="table.title", markup=False, soft_wrap=True)
    target.print(shown, markup=False)
    console.quiet = target.quiet
