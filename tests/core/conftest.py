"""What tables look like where there is little room."""

import io
import itertools

import pytest
from rich.console import Console

from lattice import bench_report, console, plan_report


@pytest.fixture
def broken_words(monkeypatch):
    """Puts a terminal of 80 columns in the place of stdout; called, it returns the words and numbers of
    reports that do not stand whole on it."""
    screen, words, table = io.StringIO(), set(), console.table
    terminal = Console(file=screen, width=80, force_terminal=True, color_system=None, legacy_windows=False)

    def noting(title, columns, rows):
        words.update(word for cell in itertools.chain(columns, *rows) for word in cell.split())
        table(title, columns, rows)

    monkeypatch.setattr(console, "console", terminal)
    for module in (bench_report, plan_report):
        monkeypatch.setattr(module, "table", noting)
    return lambda: words - set(screen.getvalue().split())
