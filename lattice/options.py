"""From a recipe's table to a component: pydantic checks, messages that name file, line and nearest key."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from lattice import registry
from lattice.toml_source import Origin, Path_, Source


def component(role: str, path: Path_, source: Source, problems: list[str]) -> Any:
    """The component that the table at `path` names by its `kind`; adds to `problems` what is wrong."""
    table = _at(source.table, path)
    shown = ".".join(path)
    place = source.origins.get(path, Origin(shown))
    if not isinstance(table, dict):
        problems.append(f"{place}: [{shown}] must be a table, not {table!r}")
        return None
    if "kind" not in table:
        problems.append(f"{place}: [{shown}] has no `kind`; known: {', '.join(registry.kinds(role))}")
        return None
    at_kind = source.origins.get((*path, "kind"), place)
    if not isinstance(table["kind"], str):
        known = ", ".join(registry.kinds(role))
        problems.append(f"{at_kind}: {shown}.kind = {_toml(table['kind'])}: must be a string; known: {known}")
        return None
    try:
        cls = registry.lookup(role, table["kind"])
    except registry.UnknownName as error:
        problems.append(f"{at_kind}: {shown}.kind: {error}")
        return None
    return build(cls, path, source, problems)


def build(cls: type, path: Path_, source: Source, problems: list[str]) -> Any:
    """An instance of a frozen dataclass from the table at `path`; None where there were problems."""
    table = dict(_at(source.table, path))
    if hasattr(cls, "kind"):
        table.pop("kind", None)
    # JSON is strict where TOML is (no number from a string) and lenient where TOML is (an array is a tuple).
    if "__pydantic_config__" not in cls.__dict__:
        cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
    try:
        return TypeAdapter(cls).validate_json(json.dumps(table, default=_refuse))
    except PydanticSchemaGenerationError:
        place = source.origins.get((*path, "kind")) or source.origins.get(path) or ".".join(path)
        problems += [
            f"{place}: {'.'.join((*path, name))}: an option of {cls.__qualname__} cannot be of type {hint}; "
            "must be bool, int, float, str, Literal, or a list, dict or dataclass of these"
            for name, hint in get_type_hints(cls, include_extras=True).items()
            if not _has_schema(hint)
        ]
    except _NoOption as error:
        for key, value in table.items():
            if _holds(value, error.value):
                place = source.origins.get((*path, key)) or source.origins.get(path) or ".".join(path)
                problems.append(f"{place}: {'.'.join((*path, key))} = {_toml(value)}: {error}")
    except ValidationError as error:
        found = [_problem(cls, path, source, dict(one)) for one in error.errors(include_url=False)]
        problems += list(dict.fromkeys(found))
    return None


def _has_schema(hint: Any) -> bool:
    with suppress(PydanticSchemaGenerationError):
        TypeAdapter(hint)
        return True
    return False


class _NoOption(TypeError):
    """A value that no option takes, such as a TOML date."""

    def __init__(self, value: Any) -> None:
        self.value = value
        super().__init__(f"must not hold a {type(value).__name__}")


def _refuse(value: Any) -> Any:
    raise _NoOption(value)


def _holds(value: Any, part: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is part or any(_holds(one, part) for one in inside)


def to_table(component: Any) -> dict[str, Any]:
    """`kind` and every option that is not None, as plain TOML values."""
    values = {"kind": component.kind} if hasattr(component, "kind") else {}
    options: dict[str, Any] = _plain(dataclasses.asdict(component))
    return values | options


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _at(table: dict[str, Any], path: Path_) -> Any:
    for key in path:
        table = table.get(key, {})
    return table


def _problem(cls: type, path: Path_, source: Source, error: dict[str, Any]) -> str:
    # pydantic also names union members and tuple indices; the recipe knows only its own keys.
    keys = _keys_of(_at(source.table, path), error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        first = message.split(" ", 1)[0].rstrip(":")
        if first in _at(source.table, (*path, *keys)) or first in _fields(cls, keys):
            keys, message = (*keys, first), message.split(": ", 1)[-1]
    whole = (*path, *keys)
    place = next(
        (source.origins[whole[:n]] for n in range(len(whole), 0, -1) if whole[:n] in source.origins), None
    )
    start = f"{place}: {'.'.join(whole)}" if place else ".".join(whole)
    if error["type"] == "unexpected_keyword_argument":
        known = _fields(cls, keys[:-1])
        return (
            f"{start}: unknown option{registry.nearest(keys[-1], known)} Known: {', '.join(known) or 'none'}"
        )
    if error["type"] in ("missing_argument", "missing") and not isinstance(error["loc"][-1], int):
        return f"{start}: missing"
    value = value_at(source.table, whole)
    if error["type"] == "missing":
        message = "has too few values"
    return f"{start}{'' if value is None else f' = {_toml(value)}'}: {message[:1].lower()}{message[1:]}"


def _keys_of(table: Any, location: tuple[Any, ...]) -> Path_:
    keys: list[str] = []
    for part in location:
        if not isinstance(part, str) or (isinstance(table, dict) and part not in table and keys):
            if isinstance(table, dict) and isinstance(part, str) and part.isidentifier():
                keys.append(part)
            break
        keys.append(part)
        table = table.get(part) if isinstance(table, dict) else None
    return tuple(keys)


def value_at(table: dict[str, Any], path: Path_) -> Any:
    """What lies at `path`; None where nothing does."""
    value: Any = table
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _toml(value: Any) -> str:
    return json.dumps(value, default=str)


def _fields(cls: type, keys: Path_) -> list[str]:
    """Option names of `cls`, or of the nested options at `keys`."""
    for key in keys:
        hint = get_type_hints(cls).get(key)
        members = [hint, *getattr(hint, "__args__", ())]
        nested = [one for one in members if isinstance(one, type) and dataclasses.is_dataclass(one)]
        if not nested:
            return []
        cls = nested[0]
    return [option.name for option in dataclasses.fields(cls) if option.init]
