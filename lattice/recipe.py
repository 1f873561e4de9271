"""Recipes: TOML layers merged into one table, and that table checked into typed, frozen options.

Layers, later over earlier: the toolkit's defaults, the files that `extends` names, the file itself, `--set`.
Tables merge key by key; a table that names another `kind` starts afresh; arrays replace. A file that is
extended by several ways is one layer, at the first of its places, so that it lies below all that extend it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import tomli_w

from lattice import options, registry, toml_source
from lattice.launch import Agreed
from lattice.protocols import ROLES, TABLES
from lattice.run_options import RunOptions
from lattice.toml_source import Origin, Path_, Source

DEFAULTS = Path(__file__).with_name("defaults.toml")
TOP_LEVEL = ("run", *TABLES)


class RecipeError(Agreed):
    """Everything that is wrong with a recipe, a line for each: place, key, value, what is allowed."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: one component for each role, or a dict of named ones."""

    run: RunOptions
    components: Mapping[str, Any]
    origins: Mapping[Path_, Origin] = field(repr=False)
    imports: tuple[str, ...] = ()
    name: str = "recipe"
    dropped: tuple[str, ...] = ()
    """A line for each table that another `kind` began anew, where that kind has options, too, that were set
    before it."""

    def component(self, role: str) -> Any:
        """The component of a role that has one. Raises RecipeError where the recipe names none."""
        if role not in self.components:
            table = ROLES[role].table or role
            raise RecipeError([f"{self.name}: the table [{table}] with a `kind` is missing"])
        return self.components[role]

    def named(self, role: str) -> dict[str, Any]:
        """The members of a role that has several."""
        return dict(self.components.get(role, {}))

    def table(self) -> dict[str, Any]:
        """The resolved recipe with every option, as plain TOML values."""
        table: dict[str, Any] = {"imports": list(self.imports)} if self.imports else {}
        table["run"] = options.to_table(self.run)
        for name, role in TABLES.items():
            value = self.components.get(role)
            if isinstance(value, dict):
                if value:
                    table[name] = {member: options.to_table(one) for member, one in value.items()}
            elif value is not None:
                table[name] = options.to_table(value)
        return table

    def to_toml(self) -> str:
        return tomli_w.dumps(self.table())

    def origin(self, path: Path_) -> Origin:
        """Where the value at `path` comes from: where it was written, or the default of its kind."""
        owner = self.components.get(TABLES.get(path[0], ""), self.run)
        if isinstance(owner, dict) and len(path) > 1:
            owner = owner.get(path[1])
        return self.origins.get(path, Origin(f"default of {getattr(owner, 'kind', path[0])}"))


def load_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Iterable[str] = (),
    *,
    over: Source | None = None,
    allow_imports: bool = True,
) -> Recipe:
    """Reads and checks a recipe.

    `recipe` is a TOML file, a nested dict of the same form, or a Recipe, which is passed on; `over` is one
    more layer over it; `overrides` are `a.b=value` with TOML values (a bare word is a string), over both.
    Raises RecipeError with all problems at once; FileNotFoundError where the file does not exist.
    """
    if isinstance(recipe, Recipe):
        if not list(overrides) and over is None:
            return recipe
        recipe = recipe.table()
    try:
        layers, name = _layers(recipe)
        layers += [*([] if over is None else [over]), *_overrides(overrides)]
    except toml_source.TomlError as error:
        raise RecipeError([str(error)]) from error
    imports = [spec for layer in layers for spec in _imports(layer)]
    if imports and not allow_imports:
        raise RecipeError(
            [
                f"this recipe imports code ({', '.join(imports)}): if you trust it, allow it with "
                "trust_imports (--trust-imports)"
            ]
        )
    laid = [_without_layer_keys(layer) for layer in layers]
    problems: list[str] = []
    checked = _check(reduce(_merge, laid), _import(layers, problems), name, problems)
    return replace(checked, dropped=_dropped(laid, checked))


def _layers(recipe: str | Path | Mapping[str, Any]) -> tuple[list[Source], str]:
    """Every layer that the recipe itself brings, the lowest first, and the recipe's name."""
    layers = [toml_source.read(DEFAULTS, "lattice/defaults.toml")]
    if not isinstance(recipe, Mapping):
        return [*layers, *_file_layers(Path(recipe), (), set())], Path(recipe).stem
    layer = toml_source.plain(dict(recipe), "dict")
    parents = _parents(layer, Path.cwd(), (), set()) if "extends" in recipe else []
    return [*layers, *parents, layer], "recipe"


def _file_layers(path: Path, children: tuple[Path, ...], done: set[Path]) -> list[Source]:
    """The layers of a file: those it extends, then itself; `imports` made absolute. A file that is `done` has
    been laid before: again, it would undo what those that extend it said over it."""
    asked = f" (extended by {children[-1]})" if children else ""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # longer than any file's name
        raise RecipeError([f"recipe '{path}'{asked}: {error.strerror}"]) from error
    if is_folder:
        raise IsADirectoryError(f"recipe '{path}' is a directory; must be a TOML file")
    if not is_file:
        raise FileNotFoundError(f"recipe '{path}' does not exist{asked}")
    if path.resolve() in [child.resolve() for child in children]:
        raise RecipeError([f"{path}: extends itself, by way of {' -> '.join(map(str, children))}"])
    if path.resolve() in done:
        return []
    done.add(path.resolve())
    layer = toml_source.read(path, _shown(path))
    names = _imports(layer)
    resolved = [str((path.parent / name).resolve()) if name.endswith(".py") else name for name in names]
    layer.table.update({"imports": resolved} if resolved else {})
    return [*_parents(layer, path.parent, (*children, path), done), layer]


def _imports(layer: Source) -> list[str]:
    names = layer.table.get("imports", [])
    # A name with a null byte is the name of no file, and the functions of paths refuse it.
    if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise RecipeError([f"{layer.origins[('imports',)]}: imports = {names!r}: must be a list of strings"])
    return names


def _parents(layer: Source, base: Path, children: tuple[Path, ...], done: set[Path]) -> list[Source]:
    names = layer.table.get("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(
            [f"{layer.origins[('extends',)]}: extends = {names!r}: must be a list of file names"]
        )
    return [source for name in names for source in _file_layers(base / name, children, done)]


def _shown(path: Path) -> str:
    """Messages name a file as short as it can be named from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _overrides(overrides: Iterable[str]) -> list[Source]:
    table: dict[str, Any] = {}
    for override in overrides:
        if override.encode(errors="ignore").decode() != override:
            raise RecipeError([f"--set {override!a}: must be UTF-8"])
        names, text = _key_and_value(override)
        if names == ["extends"]:
            raise RecipeError([f"--set {override}: only a recipe's file can extend others"])
        try:
            parsed = toml_source.loads(f"value = {text}")
        except toml_source.TomlError:
            parsed = {"value": text.strip()}  # a bare word, as a shell user writes it
        if len(parsed) > 1:
            more = ", ".join(f"'{one}'" for one in parsed if one != "value")
            raise RecipeError([f"--set {override}: must hold one value, and {more} stands after it"])
        at = table
        for name in names[:-1]:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise RecipeError([f"--set {override}: '{name}' is already set to {at!r}"])
        _lay(parsed["value"], at, names[-1])
    return [toml_source.plain(table, "--set")] if table else []


def _key_and_value(override: str) -> tuple[list[str], str]:
    """The names of its key, and the text of its value. The equals sign between them is the first with a key
    of TOML before it: one within quotes has none."""
    text = override.lstrip()
    for equals in re.finditer("=", text.partition("\n")[0]):
        try:
            at: Any = toml_source.loads(f"key = {{{text[: equals.start()]} = 0}}")["key"]
        except toml_source.TomlError:
            continue
        names: list[str] = []
        while isinstance(at, dict):
            ((name, at),) = at.items()
            names.append(name)
        return names, text[equals.end() :]
    raise RecipeError([f"--set {override}: must be of the form table.key=value"])


def _lay(value: Any, table: dict[str, Any], key: str) -> None:
    """Sets a value over what earlier overrides said: tables merge as those of files do, but that options
    without a kind may stand before the kind that they are meant for."""
    old = table.get(key)
    if isinstance(value, dict) and isinstance(old, dict):
        named = value.get("kind", old.get("kind"))
        if old.get("kind", named) == named:
            for name, one in value.items():
                _lay(one, old, name)
            return
    table[key] = value


def _without_layer_keys(layer: Source) -> Source:
    layer_keys = ("extends", "imports")
    return Source(
        {key: value for key, value in layer.table.items() if key not in layer_keys},
        {path: origin for path, origin in layer.origins.items() if path[0] not in layer_keys},
    )


def _merge(below: Source, above: Source) -> Source:
    origins = dict(below.origins)

    def merge(old: dict[str, Any], new: dict[str, Any], path: Path_) -> dict[str, Any]:
        if path and "kind" in new and new["kind"] != old.get("kind"):
            for known in [known for known in origins if known[: len(path)] == path and known != path]:
                del origins[known]
            old = {}
        merged = dict(old)
        for key, value in new.items():
            both = isinstance(value, dict) and isinstance(old.get(key), dict)
            if not both:
                for known in [known for known in origins if known[: len(path) + 1] == (*path, key)]:
                    del origins[known]
            merged[key] = merge(old[key], value, (*path, key)) if both else value
        return merged

    table = merge(below.table, above.table, ())
    return Source(table, origins | above.origins)


def _dropped(layers: list[Source], recipe: Recipe) -> tuple[str, ...]:
    resolved = recipe.table()
    lost: dict[Path_, dict[str, Any]] = {}
    for layer in layers:
        for path in layer.origins:
            value, now = (options.value_at(table, path) for table in (layer.table, resolved))
            if path in recipe.origins or isinstance(value, dict) or now in (None, value):
                continue
            anew = next(path[:end] for end in range(1, len(path)) if (*path[:end], "kind") in recipe.origins)
            lost.setdefault(anew, {})[".".join(path[len(anew) :])] = value
    said = []
    for path, values in lost.items():
        key = (*path, "kind")
        kind = f"{recipe.origins[key]}: {'.'.join(key)} = {options.value_at(resolved, key)!r}"
        without = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        said.append(f"{kind} begins the table anew, without {without}")
    return tuple(said)


def _import(layers: list[Source], problems: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for layer in layers:
        for name in _imports(layer):
            try:
                registry.import_user_code(name, Path.cwd())
            except ImportError as error:
                problems.append(f"{layer.origins[('imports',)]}: imports: {error}")
            names += [] if name in names else [name]
    return tuple(names)


def _check(source: Source, imports: tuple[str, ...], name: str, problems: list[str]) -> Recipe:
    """All tables into options; raises RecipeError with every problem found, those of before among them."""
    for key in source.table:
        if key not in TOP_LEVEL:
            hint = registry.nearest(key, (*TOP_LEVEL, "extends", "imports"))
            place = source.origins.get((key,), Origin(name))
            problems.append(f"{place}: unknown table '{key}'{hint} Known: {', '.join(TOP_LEVEL)}")
    run = None
    if isinstance(source.table["run"], dict):
        run = options.build(RunOptions, ("run",), source, problems)
    else:
        problems.append(f"{source.origins[('run',)]}: [run] must be a table, not {source.table['run']!r}")
    components: dict[str, Any] = {}
    for table, role in TABLES.items():
        if table not in source.table:
            continue
        if not ROLES[role].named:
            components[role] = options.component(role, (table,), source, problems)
        elif isinstance(source.table[table], dict):
            members = source.table[table]
            components[role] = {
                member: options.component(role, (table, member), source, problems) for member in members
            }
        else:
            problems.append(f"{source.origins[(table,)]}: [{table}] must hold named tables, [{table}.name]")
    if problems:
        raise RecipeError(problems)
    assert isinstance(run, RunOptions)
    return Recipe(run=run, components=components, origins=source.origins, imports=imports, name=name)
