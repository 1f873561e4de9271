"""Finished runs side by side: what they reached and what they cost.

Runs that differ in their seed alone are one arm, however they were computed. Losses compare only where the
text, the tokens and the way of evaluating are the same, which is checked.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lattice.ledger import Ledger, ledger, operations_of, training_passes
from lattice.load import recipe_of
from lattice.options import to_table
from lattice.protocols import Evaluator
from lattice.recipe import Recipe
from lattice.registry import nearest
from lattice.run_folder import (
    METRICS,
    RECIPE,
    SUMMARY,
    differing,
    finished,
    is_run,
    leaves,
    read_metrics,
    trained_as,
)
from lattice.thought_counts import family, thoughts_of

LOSS = "_loss"
HOW_EVALUATED = ("every", "batch")
"""Options of an evaluator that say when it looks and at how much at once; not what it measures."""
SEED_FOLDER = re.compile(r"seed\d+")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Raises ValueError where those of the steps are gone."""
        path = self.folder / METRICS
        rows = read_metrics(path)
        if not any("loss" in row for row in rows):
            raise ValueError(
                f"{path} holds no step of a run that has taken {self.summary['steps']}: restore it, or leave "
                "the run out"
            )
        return rows

    @property
    def earlier_ends(self) -> list[list[int]]:
        """After which steps it was given another number of steps, and how many it had until then."""
        ends: list[list[int]] = self.summary.get("provenance", {}).get("earlier_ends", [])
        return ends

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Tokens trained on and the values of a metric there."""
        rows = [row for row in self.metrics if key in row]
        return [row["tokens"] for row in rows], [row[key] for row in rows]


@dataclass(frozen=True)
class Spread:
    """Mean of the seeds, the lowest and the highest."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.mean(values), min(values), max(values))

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Group:
    """An arm: runs of the same training but for their seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Recipe:
        return self.runs[0].recipe

    @cached_property
    def costs(self) -> Ledger:
        return ledger(self.recipe)

    @property
    def tokens(self) -> int:
        return self.recipe.run.steps * self.recipe.run.batch_tokens

    @property
    def training_operations(self) -> float:
        """Of the whole training."""
        return self.training_operations_by(self.tokens)

    def training_operations_by(self, tokens: int) -> float:
        """Of the training up to so many tokens."""
        passes = training_passes(self.recipe, range(tokens // self.recipe.run.batch_tokens))
        return tokens * operations_of(self.recipe, passes, backward=True)

    @property
    def thoughts(self) -> int | None:
        return thoughts_of(self.recipe)

    def of(self, key: str) -> Spread:
        """A figure of the summaries."""
        return Spread.of([run.summary[key] for run in self.runs])

    @property
    def tokens_per_second(self) -> Spread:
        """Of a training step: the median of each run."""
        return Spread.of([statistics.median(run.curve("tokens_per_second")[1]) for run in self.runs])

    @cached_property
    def residuals(self) -> list[float]:
        """Relative change of the thoughts at each iteration: mean over the last tenth of training and the
        seeds, of the steps that went so far. None where there are no iterations."""
        rows = [
            row["residuals"]
            for run in self.runs
            for row in run.metrics
            if "residuals" in row and row["step"] > 0.9 * self.recipe.run.steps
        ]
        longest = max(map(len, rows), default=0)
        return [statistics.mean(row[at] for row in rows if len(row) > at) for at in range(longest)]

    def against(self, base: Group, key: str) -> list[float | None]:
        """A figure of each run's summary less that of the base's run of the same seed; None where it has no
        such run."""
        there = {run.recipe.run.seed: run.summary[key] for run in base.runs}
        return [
            run.summary[key] - there[run.recipe.run.seed] if run.recipe.run.seed in there else None
            for run in self.runs
        ]

    def row(self, evaluators: Iterable[str], base: Group) -> dict[str, Any]:
        """All figures, for json."""
        figures: dict[str, Any] = {
            "arm": self.name,
            "base": base.name,
            "seeds": [run.recipe.run.seed for run in self.runs],
        }
        for evaluator in evaluators:
            figures[f"{evaluator}{LOSS}_against_base"] = self.against(base, f"{evaluator}{LOSS}")
            for key in (f"{evaluator}{LOSS}", f"{evaluator}_bits_per_byte"):
                if all(key in run.summary for run in self.runs):
                    figures[key] = [run.summary[key] for run in self.runs]
            curves = [run.curve(f"{evaluator}/loss") for run in self.runs]
            figures[f"{evaluator}_curves"] = [list(zip(*curve, strict=True)) for curve in curves]
        return {
            **figures,
            "thoughts": self.thoughts,
            "residuals": self.residuals,
            "parameters": self.costs.parameters,
            "layer_parameters": self.costs.layer_parameters,
            "tokens": self.tokens,
            "training_operations_per_token": self.costs.training_operations,
            "training_operations": self.training_operations,
            "inference_operations_per_token": self.costs.inference_operations,
            "tokens_per_second": self.tokens_per_second.mean,
            "peak_memory_mib": self.of("peak_memory_mib").mean,
            "hardware": sorted({run.summary["provenance"]["hardware"] for run in self.runs}),
        }


def find_runs(paths: Iterable[Path], *, trust_imports: bool = False) -> tuple[list[Run], list[Path]]:
    """The finished runs at and beneath `paths`, and the directories of those that are not finished, or were
    and now go on to more steps.

    Raises FileNotFoundError for a path without any run, and the errors of a recipe that cannot be read.
    """
    found: list[Run] = []
    unfinished: list[Path] = []
    for folder in run_folders(paths):
        if (folder / SUMMARY).is_file():
            recipe = recipe_of(folder, trust_imports=trust_imports)
            summary = finished(folder, recipe.run.steps)
            if summary is not None:
                found.append(Run(folder, recipe, summary))
                continue
        unfinished.append(folder)
    return found, unfinished


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The runs at and beneath `paths`. Raises FileNotFoundError for a path without any."""
    folders: list[Path] = []
    for path in paths:
        beneath = [path] if is_run(path) else sorted(filter(is_run, (at.parent for at in path.rglob(RECIPE))))
        if not beneath:
            raise FileNotFoundError(
                f"'{path}' is no run and holds none: give directories that `lattice run` or `lattice sweep` "
                "wrote"
            )
        folders += beneath
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(folder.resolve(), folder)
    return list(once.values())


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Runs by what they were trained as, in the order in which they were given. Where a seed would be there
    twice, as in arms of a study that come to the same recipe, each arm's directory is a group."""
    trained = [json.dumps([trained_as(run.recipe), run.earlier_ends], sort_keys=True) for run in runs]
    counts = Counter((of, run.recipe.run.seed) for of, run in zip(trained, runs, strict=True))
    apart = {of for (of, _), count in counts.items() if count > 1}
    members: dict[tuple[str, Path | None], list[Run]] = {}
    for of, run in zip(trained, runs, strict=True):
        members.setdefault((of, _arm(run.folder) if of in apart else None), []).append(run)
    names = [_name(first.folder) for first, *_ in members.values()]
    return [
        Group(name if names.count(name) == 1 else str(group[0].folder), tuple(group))
        for name, group in zip(names, members.values(), strict=True)
    ]


def base_of(groups: Sequence[Group]) -> Group:
    """The arm that differs least from all others together; of several such the one that is trained with the
    fewest operations."""
    options = [trained_as(group.recipe) for group in groups]

    def away(index: int) -> tuple[int, float]:
        differences = sum(len(differing(options[index], other)) for other in options)
        return differences, groups[index].training_operations

    return groups[min(range(len(groups)), key=away)]


def families_of(groups: Iterable[Group]) -> list[list[Group]]:
    """Arms that differ in their number of thoughts alone, by that number. One without thoughts begins every
    family that is trained as it is: how it would think changes nothing."""
    members: dict[tuple[str, str], list[Group]] = {}
    plain: dict[str, Group] = {}
    for group in groups:
        key = family(group.recipe)
        if key is not None and group.thoughts == 0:
            plain[key[0]] = group
        elif key is not None:
            members.setdefault(key, []).append(group)
    return [
        sorted([*([plain[trained]] if trained in plain else []), *of], key=lambda group: group.thoughts or 0)
        for (trained, _), of in members.items()
    ]


def _name(folder: Path) -> str:
    return _arm(folder).name


def _arm(folder: Path) -> Path:
    """The directory of an arm, for a seed of it; a run's own otherwise."""
    folder = folder.resolve()
    return folder.parent if SEED_FOLDER.fullmatch(folder.name) else folder


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises ValueError, with all differences, where the losses of runs say nothing about each other."""
    first, problems = runs[0], []
    for run in runs:
        if "provenance" not in run.summary:
            problems.append(f"'{run.folder}' does not say on what it was trained: it is of an older version")
    if problems:
        raise ValueError("\n".join(problems))
    for run in runs[1:]:
        differ = [
            f"{what} {ours}, {theirs}"
            for what, (ours, theirs) in differing(_identity(first), _identity(run)).items()
        ]
        if differ:
            problems.append(
                f"the losses of '{first.folder}' and '{run.folder}' do not compare, for they differ in: "
                + "; ".join(differ)
            )
    if problems:
        raise ValueError("\n".join(problems))


def _identity(run: Run) -> dict[str, str]:
    """What must agree for two losses to compare."""
    prints = run.summary["provenance"]["fingerprints"]
    texts = {"training": "training text", "validation": "validation text"}
    return {
        **{texts.get(name, name): value[:12] for name, value in prints.items()},
        "run.sequence_tokens": str(run.recipe.run.sequence_tokens),
    }


def evaluators_of(runs: Sequence[Run], wanted: str | None = None) -> list[str]:
    """The evaluators, alike in all runs, that gave a loss; `wanted` first. Raises ValueError where there is
    none, or not that one."""
    recipes = [run.recipe for run in runs]
    names = [name for name in alike(recipes) if all(f"{name}{LOSS}" in run.summary for run in runs)]
    if wanted is not None and wanted not in names:
        known = f" Known: {', '.join(names)}" if names else ""
        raise ValueError(
            f"evaluator '{wanted}' did not give a loss in the same way in all runs"
            f"{nearest(wanted, names)}{known}"
        )
    if not names:
        raise ValueError(
            f"the runs have no evaluator with a loss in common: nothing compares them{unlike(recipes)}"
        )
    return sorted(names, key=lambda name: name != wanted)


def alike(recipes: Sequence[Recipe]) -> list[str]:
    """The evaluators that measure the same in all recipes."""
    first, *others = map(_measured, recipes)
    return [name for name in first if all(other.get(name) == first[name] for other in others)]


def comparable(recipes: Sequence[Recipe]) -> list[str]:
    """The evaluators whose losses will compare runs of these recipes."""
    evaluators: dict[str, Evaluator] = recipes[0].named("evaluator")
    return [name for name in alike(recipes) if evaluators[name].gives_loss]


def unlike(recipes: Sequence[Recipe]) -> str:
    """What evaluators measure otherwise than in the first recipe, for messages; nothing if they do not."""
    first, *others = (leaves({"evaluators": _measured(recipe)}) for recipe in recipes)
    found = [
        f"{key} {before!r}, {after!r}"
        for other in others
        for key, (before, after) in differing(first, other).items()
    ]
    return f"; they differ in: {'; '.join(dict.fromkeys(found))}" if found else ""


def _measured(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The options of each evaluator, but for those that change none of its figures."""
    return {
        name: {key: value for key, value in to_table(one).items() if key not in HOW_EVALUATED}
        for name, one in recipe.named("evaluator").items()
    }
