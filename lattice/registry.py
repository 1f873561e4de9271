"""Kinds by role: `@register(role, kind)`, lookup with a suggestion, and the import of a user's own file.

The built-in kinds lie in `lattice/components/<role>/`; a role's folder is imported when the role is first
asked for, so that the core never names a concrete component.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from lattice.protocols import ROLES

C = TypeVar("C", bound=type)
_kinds: dict[str, dict[str, type]] = {role: {} for role in ROLES}


class UnknownName(ValueError):
    """A role or kind that does not exist; the message lists what does."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends a sentence: with `; did you mean 'x'?` for the known name closest to `name`, else a full stop."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


def register(role: str, kind: str) -> Callable[[C], C]:
    """Class decorator: makes a component known as `kind` for `role`.

    Raises TypeError where the class is no frozen keyword-only dataclass, or lacks a method of the role's
    Protocol, or names a method's arguments differently; ValueError for a role that does not exist or a
    kind that is already taken.
    """
    if role not in ROLES:
        raise UnknownName(f"role '{role}' does not exist{nearest(role, ROLES)} Roles: {', '.join(ROLES)}")

    def decorate(cls: C) -> C:
        _conforms(cls, role)
        taken = _kinds[role].get(kind)
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"kind '{kind}' of role '{role}' is already {taken.__module__}.{taken.__qualname__}"
            )
        _kinds[role][kind] = cls
        cls.kind = kind  # type: ignore[attr-defined]
        return cls

    return decorate


def _conforms(cls: type, role: str) -> None:
    """A method that is missing or misnamed is reported when the file is imported, not deep in a run."""
    name, protocol = cls.__qualname__, ROLES[role].protocol
    params = vars(cls).get("__dataclass_params__")  # its own: a subclass is no dataclass by inheritance
    if params is None or not params.frozen:
        raise TypeError(
            f"{name} must be decorated with @dataclass(frozen=True, kw_only=True) below @register"
        )
    if any(not option.kw_only for option in dataclasses.fields(cls) if option.init):
        raise TypeError(f"{name} must be a keyword-only dataclass: @dataclass(frozen=True, kw_only=True)")
    problems = []
    for method, expected in inspect.getmembers(protocol):
        if method.startswith("_") or not getattr(expected, "__isabstractmethod__", False):
            continue
        actual = getattr(cls, method, None)
        if actual is None or getattr(actual, "__isabstractmethod__", False):
            problems.append(f"'{method}' is missing")
        elif callable(expected) and callable(actual):
            wanted, given = _arguments(expected), _arguments(actual)
            if wanted != given:
                problems.append(f"'{method}' takes ({', '.join(given)}), not ({', '.join(wanted)})")
    names = {option.name for option in dataclasses.fields(cls)}
    for attribute in getattr(protocol, "__annotations__", {}):
        if attribute not in names and not hasattr(cls, attribute):
            problems.append(f"the option '{attribute}' is missing")
    if problems:
        raise TypeError(
            f"{name} is no {role}: {'; '.join(problems)} (see lattice.protocols.{protocol.__name__})"
        )


def _arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@cache
def _load_builtin(role: str) -> None:
    folder = importlib.import_module(f"lattice.components.{role}")
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")


def kinds(role: str) -> dict[str, type]:
    """Every kind of a role, by name."""
    _load_builtin(role)
    return dict(sorted(_kinds[role].items()))


def lookup(role: str, kind: str) -> type:
    """The component class. Raises UnknownName with the nearest kind and all that exist."""
    known = kinds(role)
    if kind not in known:
        raise UnknownName(
            f"kind '{kind}' of role '{role}' does not exist{nearest(kind, known)} Known: {', '.join(known)}"
        )
    return known[kind]


def import_user_code(name: str, base: Path) -> None:
    """Imports a user's component: `./file.py` relative to `base`, or an installed package by dotted name.

    Whatever the import raises is passed on as ImportError with the file's name.
    """
    try:
        if name.endswith(".py"):
            _import_file((base / name).resolve())
        else:
            importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"'{name}' does not import: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    module_name = f"lattice_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
