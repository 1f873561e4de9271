"""A study: one base recipe, and arms that differ from it by a few keys.

    [study]
    base = "plain.toml"                    # relative to this file
    seeds = [0, 1]

    [arms.plain]                           # the base as it is

    [arms.latent]
    recurrence = { kind = "latent_thoughts", thoughts = 1 }

    [arms.double_depth]                    # the base again, as expensive at inference as `latent`
    match = { quantity = "inference_flops", of = "latent", by = ["backbone.num_hidden_layers"] }

What makes a comparison fair is not for an arm to change: the text, its order, the tokenizer, and the batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from lattice import options, toml_source
from lattice.compare import comparable, unlike
from lattice.ledger import Ledger, ledger
from lattice.recipe import Recipe, RecipeError, load_recipe
from lattice.registry import nearest
from lattice.toml_source import Origin, Path_, Source

SHARED: tuple[Path_, ...] = (
    ("run", "seed"),
    ("run", "batch_tokens"),
    ("run", "sequence_tokens"),
    ("data",),
    ("tokenizer",),
)
"""What all arms have in common."""
MATCH = "match"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
WRITTEN = (".json", ".png", ".html")
"""What a comparison writes."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The `[study]` table."""

    base: str
    """The recipe that every arm starts from, relative to the study's file."""
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once with each."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: must be one or more, each another")


@dataclass(frozen=True, kw_only=True)
class Match:
    """Whole numbers of a recipe, scaled together until a cost equals that of another arm."""

    quantity: Literal["inference_flops", "training_flops", "parameters", "layer_parameters"]
    """Of a decoded token, of the whole training, or how many."""
    of: str
    """The arm whose cost is matched."""
    times: float = 1.0
    """Multiplier of that cost."""
    by: tuple[str, ...]
    """Keys that are changed, all in the proportion they have in the base."""

    def __post_init__(self) -> None:
        if self.times <= 0:
            raise ValueError(f"times = {self.times}: must be greater than 0")
        if not self.by:
            raise ValueError("by = []: must name at least one key, such as 'backbone.num_hidden_layers'")


QUANTITIES: dict[str, Callable[[Recipe, Ledger], float]] = {
    "inference_flops": lambda recipe, costs: costs.inference_operations,
    "training_flops": lambda recipe, costs: (
        costs.training_operations * recipe.run.steps * recipe.run.batch_tokens
    ),
    "parameters": lambda recipe, costs: costs.parameters,
    "layer_parameters": lambda recipe, costs: costs.layer_parameters,
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One recipe of a study, to be trained with each seed."""

    name: str
    recipe: Recipe
    matched: str = ""
    """What was matched, and how nearly."""


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study of a TOML file; `overrides` are laid over every arm. Raises RecipeError with all problems at
    once, FileNotFoundError where a file does not exist."""
    if not path.is_file():
        raise FileNotFoundError(f"study '{path}' does not exist")
    try:
        source = toml_source.read(path, str(path))
    except toml_source.TomlError as error:
        raise RecipeError([str(error)]) from error
    problems: list[str] = []
    for key in source.table:
        if key not in ("study", "arms"):
            hint = nearest(key, ("study", "arms"))
            problems.append(f"{source.origins[(key,)]}: unknown table '{key}'{hint} Known: study, arms")
    tables = source.table.get("arms", {})
    if not isinstance(source.table.get("study"), dict):
        problems.append(f"{path}: the table [study] with a `base` is missing")
    if not isinstance(tables, dict) or not tables:
        problems.append(f"{path}: there are no arms: add tables [arms.NAME]")
    if problems:
        raise RecipeError(problems)
    study = options.build(StudyOptions, ("study",), source, problems)
    if study is None:
        raise RecipeError(problems)
    arms = _Arms(source, path.parent / study.base, overrides, problems)
    found = arms.all()
    recipes = [arm.recipe for arm in found.values()]
    if not problems and not comparable(recipes):
        problems.append(
            f"{path}: the arms have no evaluator with a loss in common, so that nothing compares them: set "
            f"[evaluators.NAME] in the base{unlike(recipes)}"
        )
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return Study(name=path.stem, seeds=study.seeds, arms=tuple(found[name] for name in tables))


class _Arms:
    """The arms of one file, each after those that it is matched to."""

    def __init__(self, source: Source, base: Path, overrides: Sequence[str], problems: list[str]) -> None:
        self._source, self._base, self._overrides = source, base, overrides
        self._problems = problems
        self._tables: dict[str, Any] = source.table["arms"]

    def all(self) -> dict[str, Arm]:
        matches = {name: self._match(name) for name in self._tables}
        order = TopologicalSorter({name: {match.of} if match else () for name, match in matches.items()})
        try:
            names = [name for name in order.static_order() if name in self._tables]
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            self._problems.append(f"{self._place(error.args[1][0])}: arms match one another: {circle}")
            return {}
        arms: dict[str, Arm] = {}
        for name in names:
            match = matches[name]
            recipe = self._recipe(name)
            if recipe is None:
                continue
            if match is None:
                arms[name] = Arm(name=name, recipe=recipe)
            elif match.of in arms:
                try:
                    arms[name] = _matched(name, recipe, match, arms[match.of].recipe)
                except ValueError as error:
                    self._problems.append(f"{self._place(name, MATCH)}: arms.{name}.match: {error}")
        return arms

    def _place(self, *path: str) -> Origin:
        return self._source.origins.get(("arms", *path), Origin(f"arms.{path[0]}"))

    def _match(self, name: str) -> Match | None:
        table = self._tables[name]
        if not NAME.fullmatch(name):
            problem = "an arm's name may hold letters, digits and _ . + = - and begins with one of the former"
            self._problems.append(f"{self._place(name)}: arm '{name}': {problem}")
        elif Path(name).suffix in WRITTEN:
            problem = (
                f"an arm's name may not end in {', '.join(WRITTEN)}: the comparison's files lie beside it"
            )
            self._problems.append(f"{self._place(name)}: arm '{name}': {problem}")
        if not isinstance(table, dict) or MATCH not in table:
            return None
        match: Match | None = options.build(Match, ("arms", name, MATCH), self._source, self._problems)
        for key in match.by if match is not None else ():
            if any(tuple(key.split("."))[: len(shared)] == shared for shared in SHARED):
                place = self._place(name, MATCH, "by")
                self._problems.append(f"{place}: arms.{name}.match.by: '{key}' is what all arms share")
        if match is not None and match.of not in self._tables:
            hint = nearest(match.of, self._tables)
            place = self._place(name, MATCH, "of")
            self._problems.append(f"{place}: arms.{name}.match.of: there is no arm '{match.of}'{hint}")
            return None
        return match

    def _recipe(self, name: str) -> Recipe | None:
        table = self._tables[name]
        if not isinstance(table, dict):
            self._problems.append(f"{self._place(name)}: [arms.{name}] must be a table, not {table!r}")
            return None
        inside = {path[2:]: at for path, at in self._source.origins.items() if path[:2] == ("arms", name)}
        layer = Source(
            {key: value for key, value in table.items() if key != MATCH},
            {path: origin for path, origin in inside.items() if path and path[0] != MATCH},
        )
        before = len(self._problems)
        for key in SHARED:
            if key in layer.origins:
                problem = f"arms.{name} sets {'.'.join(key)}, which all arms share: set it in the base"
                self._problems.append(f"{layer.origins[key]}: {problem}")
        for key_ in ("extends", "imports"):
            if (key_,) in layer.origins:
                problem = f"arms.{name} has '{key_}': only the base can have it"
                self._problems.append(f"{layer.origins[(key_,)]}: {problem}")
        if len(self._problems) > before:
            return None
        try:
            recipe = load_recipe(self._base, self._overrides, over=layer)
        except RecipeError as error:
            self._problems += [f"arm '{name}': {problem}" for problem in error.problems]
            return None
        if recipe.origin(("run", "seed")).place == "--set":
            self._problems.append(
                f"--set run.seed={recipe.run.seed}: an arm is trained with the seeds of the study, set there"
            )
        return recipe


def _matched(name: str, recipe: Recipe, match: Match, other: Recipe) -> Arm:
    """`recipe` with the keys of `match` scaled until its cost is as near as whole numbers bring it."""
    measure = QUANTITIES[match.quantity]
    target = match.times * measure(other, ledger(other))
    values = {key: _whole_number(recipe, key) for key in match.by}
    unit = reduce(math.gcd, values.values())

    @cache
    def at(multiple: int) -> tuple[Recipe, float]:
        """With values of `multiple` units, and its cost over that which is wanted."""
        settings = [f"{key}={value // unit * multiple}" for key, value in values.items()]
        scaled = load_recipe(recipe, settings)
        return scaled, measure(scaled, ledger(scaled)) / target

    try:
        found, ratio = min(map(at, _around(at, unit)), key=lambda pair: abs(math.log(pair[1])))
    except RecipeError as error:
        raise ValueError(
            f"{error} (by: keys that must keep a proportion have to be named together)"
        ) from error
    except OverflowError as error:
        raise ValueError(f"{', '.join(match.by)} do not change the {match.quantity}") from error
    shown = ", ".join(f"{key} = {_whole_number(found, key)}" for key in match.by)
    if ratio > 1 and found is at(1)[0]:
        raise ValueError(
            f"the {match.quantity} are {ratio:.3f} of those wanted even with {shown}; must be 1 or less"
        )
    wanted = "" if match.times == 1 else f"{match.times:g} times "
    return Arm(
        name=name,
        recipe=found,
        matched=f"{match.quantity} {ratio:.3f} of {wanted}those of {match.of}: {shown}",
    )


def _around(at: Callable[[int], tuple[Recipe, float]], first: int) -> list[int]:
    """The last multiple that costs too little and the first that costs enough, searched from `first` on.
    Raises OverflowError where none costs enough, or all cost the same."""
    low, high = 0, first
    while at(high)[1] < 1:
        low, high = high, 2 * high
        if high > 2**40:
            raise OverflowError
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[1] < 1 else (low, middle)
    if low:
        return [low, high]
    if at(2)[1] == at(1)[1]:
        raise OverflowError
    return [high]


def _whole_number(recipe: Recipe, key: str) -> int:
    at: Any = recipe.table()
    for name in key.split("."):
        if not isinstance(at, dict) or name not in at:
            known = at if isinstance(at, dict) else {}
            raise ValueError(f"by: '{key}' is no key of the recipe{nearest(name, known)}")
        at = at[name]
    if not isinstance(at, int) or isinstance(at, bool) or at < 1:
        raise ValueError(f"by: {key} = {at!r}: must be a whole number of at least 1")
    return at
