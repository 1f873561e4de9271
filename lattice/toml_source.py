"""TOML files whose every leaf knows its line.

tomli gives values without places. A statement is found by giving tomli one line more until what it has
parses, so that its grammar, and not a second one here, decides where a value ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

Path_ = tuple[str, ...]
DEEPEST = 32
"""Tables within tables that are read: far more than any recipe has, far fewer than Python recurses."""
LONGEST = 1000
"""Lines of one value: finding where it ends takes the square of their number."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    place: str
    """A file, `--set`, `dict` or `default of …`."""
    line: int | None = None

    def __str__(self) -> str:
        return self.place if self.line is None else f"{self.place}:{self.line}"


@dataclass(frozen=True)
class Source:
    """One layer of a recipe: a table and the origin of each of its keys, tables included."""

    table: dict[str, Any]
    origins: dict[Path_, Origin]


class TomlError(ValueError):
    """Text that is no TOML that can be used; the message says why, that of `read` also where."""


def read(path: Path, shown: str) -> Source:
    """Reads a file; `shown` is how messages name it."""
    try:
        text = path.read_bytes().decode("utf-8")  # read as text, a lone carriage return would pass
        table = loads(text)
    except UnicodeDecodeError as error:
        raise TomlError(f"{shown}: not UTF-8 at byte {error.start}") from error
    except TomlError as error:
        line = getattr(error.__cause__, "lineno", None)
        raise TomlError(f"{shown}{f':{line}' if line else ''}: no valid TOML: {error}") from error
    _check_depth(table, shown)
    origins = {path_: Origin(shown, line) for path_, line in _lines(text, shown).items()}
    return Source(table, origins)


def loads(text: str) -> dict[str, Any]:
    """tomli's, with all that it raises as TomlError: numbers too long for Python and values too deep, too."""
    try:
        return tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise TomlError(str(error)) from error


def _check_depth(table: dict[str, Any], place: str) -> None:
    level = [table]
    for _ in range(DEEPEST):
        level = [value for one in level for value in one.values() if isinstance(value, dict)]
    if level:
        raise TomlError(f"{place}: more than {DEEPEST} tables lie in one another")


def plain(table: dict[str, Any], place: str) -> Source:
    """A table that was not read from a file. Raises TomlError where tables lie too deep."""
    _check_depth(table, place)
    return Source(table, {path: Origin(place) for path in paths(table)})


def paths(table: dict[str, Any], above: Path_ = ()) -> list[Path_]:
    """Every key of a nested table, tables included, outermost first."""
    found: list[Path_] = []
    for key, value in table.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += paths(value, (*above, key))
    return found


def _lines(text: str, shown: str) -> dict[Path_, int]:
    """The line on which each key of a valid document is written."""
    lines: dict[Path_, int] = {}
    header: Path_ = ()
    start, statement = 0, ""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines knows more line ends than TOML
        start = number if not statement.strip() else start
        statement += line + "\n"
        try:
            parsed = loads(statement)
        except TomlError as error:  # the value goes on in the next line
            if number - start >= LONGEST:
                raise TomlError(f"{shown}:{start}: a value takes more than {LONGEST} lines") from error
            continue
        is_header = statement.lstrip().startswith("[")
        keys = paths(parsed)
        if is_header and keys:
            header = keys[-1]
        for key in keys:
            lines.setdefault(key if is_header else (*header, *key), start)
        statement = ""
    return lines
