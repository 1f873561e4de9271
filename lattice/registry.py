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
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lattice.protocols import ROLES, Shape, Unroll

C = TypeVar("C", bound=type)
_kinds: dict[str, dict[str, type]] = {role: {} for role in ROLES}
_files: dict[type, str | None] = {}
"""What the file of each class held when it was registered, as a digest."""


class UnknownName(ValueError):
    """A role or kind that does not exist; the message lists what does."""


def nearest(name: str, known: Iterable[str], most: int = 1) -> str:
    """Ends a sentence: with `; did you mean 'x'?` for the known names closest to `name`, `most` of them, else
    with a full stop. ARC-Easy is as close to arc_easy as can be."""
    folded = {_folded(one): one for one in known}
    matches = difflib.get_close_matches(_folded(name), folded, n=most, cutoff=0.5)
    close = [f"'{folded[one]}'" for one in matches]
    return f"; did you mean {' or '.join(close)}?" if close else "."


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_")


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
        if taken and not _same_code(taken, cls):
            raise ValueError(
                f"kind '{kind}' of role '{role}' is already {taken.__module__}.{taken.__qualname__}"
            )
        _kinds[role][kind] = cls
        _files[cls] = _file_digest(cls)
        cls.kind = kind  # type: ignore[attr-defined]
        return cls

    return decorate


def _same_code(old: type, new: type) -> bool:
    """Whether both are one class, imported again or from a copy of its file: an exported model holds one."""
    if old.__qualname__ != new.__qualname__:
        return False
    return old.__module__ == new.__module__ or _files.get(old) == _file_digest(new) is not None


def _file_digest(cls: type) -> str | None:
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None


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
        if method.startswith("_") or not (callable(expected) or isinstance(expected, property)):
            continue
        actual = getattr(cls, method, None)
        if actual is None or getattr(actual, "__isabstractmethod__", False):
            problems.append(f"'{method}' is missing")
        elif isinstance(expected, property) == callable(actual):
            form = "a property" if isinstance(expected, property) else "a method"
            problems.append(f"'{method}' must be {form}")
        elif callable(expected) and callable(actual):
            wanted, given = _arguments(expected), _arguments(actual)
            if wanted != given:
                problems.append(f"'{method}' takes ({', '.join(given)}), not ({', '.join(wanted)})")
    names = {option.name for option in dataclasses.fields(cls)}
    if "kind" in names:
        problems.append("no option may be called 'kind', which names the component")
    for attribute in getattr(protocol, "__annotations__", {}):
        if attribute not in names and not hasattr(cls, attribute):
            problems.append(f"the option '{attribute}' is missing")
    if problems:
        raise TypeError(
            f"{name} is no {role}: {'; '.join(problems)} (see lattice.protocols.{protocol.__name__})"
        )


def _arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def check_unroll(unroll: Any) -> None:
    """Raises TypeError, naming method and argument, where what a recurrence builds is no Unroll."""
    cls = type(unroll)
    problems = []
    for method in ("__call__", "step"):
        # A module is called through forward.
        name = "forward" if method == "__call__" and isinstance(unroll, nn.Module) else method
        actual = getattr(cls, name, None)
        if actual is None:
            problems.append(f"'{name}' is missing")
            continue
        wanted, given = _arguments(getattr(Unroll, method)), _arguments(actual)
        lacking = [f"lacks the argument '{argument}'" for argument in wanted if argument not in given]
        unknown = [f"has an unknown argument '{argument}'" for argument in given if argument not in wanted]
        if wanted != given:
            said = ", ".join(lacking + unknown) or "has them in another order"
            problems.append(f"'{name}' takes ({', '.join(given)}), not ({', '.join(wanted)}): it {said}")
    if not isinstance(unroll, nn.Module):  # then nothing gives its tensors a device, or puts them into a file
        held = [
            name
            for name, value in getattr(unroll, "__dict__", {}).items()
            if isinstance(value, Tensor | nn.Module)
        ]
        problems += [
            f"'{name}' needs a module to hold it: inherit torch.nn.Module before Unroll, with `forward` for "
            "`__call__`, and give constants to register_buffer; or compute it in the call"
            for name in held
        ]
    if problems:
        raise TypeError(
            f"{cls.__qualname__} is no Unroll: {'; '.join(problems)} (see lattice.protocols.Unroll)"
        )


@cache
def _load_builtin(role: str) -> None:
    folder = importlib.import_module(f"lattice.components.{role}")
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")


def kinds(role: str) -> dict[str, type]:
    """Every kind of a role, by name."""
    _load_builtin(role)
    return dict(sorted(_kinds[role].items()))


def defining(role: str, method: str) -> dict[str, type]:
    """Those kinds of a role whose class itself defines a method: of what says which kind something is of, one
    that is inherited would claim what is its base's."""
    return {kind: cls for kind, cls in kinds(role).items() if method in vars(cls)}


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


USERS = "lattice_user_"
"""How the modules of users' files begin."""


def place_of(error: BaseException) -> str:
    """Where in a user's file an error arose, in parentheses; empty for one that arose elsewhere."""
    frames = traceback.walk_tb(error.__traceback__)
    # Code that was generated may belong to no module.
    named = ((frame, line, str(frame.f_globals.get("__name__"))) for frame, line in frames)
    theirs = [(frame, line) for frame, line, module in named if module.startswith(USERS)]
    if not theirs:
        return ""
    frame, line = theirs[-1]
    return f" ({frame.f_code.co_filename}:{line}, in {frame.f_code.co_name})"


def module_of(path: Path) -> str:
    """The name under which a user's file is imported."""
    return f"{USERS}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    module_name = module_of(path)
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
        for cls in defined_in(module_name, "recurrence").values():
            _try_build(cls)
    except BaseException:
        del sys.modules[module_name]
        for known in _kinds.values():
            for kind in [kind for kind, cls in known.items() if cls.__module__ == module_name]:
                del known[kind]
        raise


def defined_in(module_name: str, role: str) -> dict[str, type]:
    """The kinds of a role that one module registered."""
    return {kind: cls for kind, cls in _kinds[role].items() if cls.__module__ == module_name}


def _try_build(cls: type) -> None:
    """What a recurrence builds is looked at when its file is imported, if its options have defaults."""
    try:
        with torch.device("meta"):
            unroll = cls().build(Shape(hidden_size=64, num_layers=8, vocab_size=128, context=64, splits=4))
    except Exception:  # an option is required, or this shape does not suit it: the model will look again
        return
    check_unroll(unroll)
