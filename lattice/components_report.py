"""What `lattice components` shows: every kind, its options, and what their docstrings say."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise

from lattice import registry
from lattice.console import say, table
from lattice.protocols import ROLES
from lattice.run_options import RunOptions

RUN = "run"
"""The table of a recipe that is no component's."""

NESTED = "a table"
"""The default of an option that is one."""


def show_components(role: str | None) -> None:
    """The kinds of all roles with their options; of one role, or of [run], with what each option means.
    Raises UnknownName for a role that does not exist."""
    if role is None:
        for name in (*ROLES, RUN):
            rows = [[kind, _summary(cls), _inline(cls)] for kind, cls in _kinds(name).items()]
            table(name, ["kind", "what it is", "options"], rows)
        return
    if role not in (*ROLES, RUN):
        close = registry.nearest(role, (*ROLES, RUN))
        raise registry.UnknownName(
            f"role '{role}' does not exist{close} Roles: {', '.join(ROLES)}; {RUN} is the table [{RUN}]"
        )
    for kind, cls in _kinds(role).items():
        title = f"{' '.join(filter(None, (role, kind)))}: {_summary(cls)}"
        if rows := [list(row) for row in options_of(cls)]:
            table(title, ["option", "default", "what it is"], rows)
        else:
            say(f"{title} It has no options.")


def options_of(cls: type, above: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each option; those of a nested table follow it, by their dotted names."""
    meanings = _meanings(cls)
    for option in fields(cls):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        name, meaning = above + option.name, meanings.get(option.name, "")
        if is_dataclass(default):
            yield name, NESTED, meaning
            yield from options_of(type(default), f"{name}.")
        elif default is MISSING:
            yield name, "required", meaning
        else:
            yield name, "not set" if default is None else json.dumps(default), meaning


def _kinds(role: str) -> dict[str, type]:
    return {"": RunOptions} if role == RUN else registry.kinds(role)


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def _inline(cls: type) -> str:
    """Each option with its default, as it would stand in a recipe."""
    shown = ((name, default) for name, default, _ in options_of(cls) if default != NESTED)
    return "\n".join(f"{name} = {default}" for name, default in shown)


def _meanings(cls: type) -> dict[str, str]:
    """The docstrings below the attributes of a class and of those that it inherits from, by name: read from
    the source, since Python keeps none of them."""
    found = {}
    for one in reversed(cls.__mro__):
        with suppress(OSError, TypeError):  # a class without source
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
            assert isinstance(tree, ast.ClassDef)
            for attribute, below in pairwise(tree.body):
                match attribute, below:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        found[name] = " ".join(text.split())
    return found
