"""Prompts from a file, and completions that an interrupted run has written already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_prompts(path: Path) -> list[str]:
    """One a line of text; of .jsonl the values of "prompt". Raises ValueError naming file and line."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: does not exist or is no file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start}: not UTF-8: {error.reason}") from error
    lines = lines[:-1] if lines[-1] == "" else lines
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for line in lines]
    return [_value(path, at, line, "prompt") for at, line in enumerate(lines, start=1) if line.strip()]


def _value(path: Path, at: int, line: str, key: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{at}: no valid JSON: {error.msg}") from error
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        raise ValueError(f'{path}:{at}: must be an object with a string "{key}"')
    return str(row[key])


def unfinished(
    prompts: list[str], out: Path | None, settings: dict[str, Any] | None = None
) -> list[tuple[int, str]]:
    """The numbered prompts that `out` does not hold yet. A line that was cut off is dropped from it. Raises
    ValueError where it holds another prompt under a number, or was written with other `settings`."""
    numbered = list(enumerate(prompts))
    if out is None or not out.is_file():
        return numbered
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]  # before it is text: the cut may lie within a character
    done = set()
    for at, line in enumerate(whole.decode().split("\n")[:-1], start=1):
        prompt = _value(out, at, line, "prompt")
        row = json.loads(line)
        number, before = row.get("number"), row.get("settings") or {}
        differ = [
            f"{name} {before.get(name)!r} there, {value!r} here"
            for name, value in (settings or {}).items()
            if not _same(before.get(name), value)
        ]
        if differ:
            raise ValueError(
                f"{out}:{at}: was generated otherwise: {'; '.join(differ)}; choose another file with --out, "
                "or remove it"
            )
        if not isinstance(number, int) or not 0 <= number < len(prompts) or prompts[number] != prompt:
            raise ValueError(
                f"{out}:{at}: is of other prompts than these; choose another file with --out, or remove it"
            )
        done.add(number)
    if whole != data:
        out.write_bytes(whole)
    return [(number, prompt) for number, prompt in numbered if number not in done]


def _same(before: Any, value: Any) -> bool:
    """Whether a setting is as it was, a path written otherwise included."""
    if isinstance(before, str) and isinstance(value, str) and Path(value).is_absolute():
        return Path(before).resolve() == Path(value)
    return bool(before == value)
