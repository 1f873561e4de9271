"""`lattice eval`: a trained model on held-out text and on tasks, at any number of thoughts and iterations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lattice import harness, preflight
from lattice.atomic import CannotWrite, append_line, check_writable, make_folder, naming
from lattice.console import errors, say, table, warn
from lattice.figures import figures as figures_of
from lattice.load import locate, recipe_of, saved, subject_of
from lattice.protocols import Backbone, EvaluationSubject, Evaluator, Metrics, kind_of
from lattice.recipe import Recipe
from lattice.run_folder import read_table
from lattice.thought_counts import counted

RESULTS = "evaluation.jsonl"
STDERR = "_stderr"
DOCUMENTS = "documents"
"""The evaluator that is added to the recipe's, and its kind."""
OPTIONS = {
    DOCUMENTS: {"limit": "max_documents", "overlap": "overlap", "batch": "batch"},
    "lm_eval": {"limit": "limit", "batch": "batch"},
}
"""By kind of evaluator: what its options call that which is wanted."""
LONGEST = 200
"""Bytes of a folder's name: file systems take 255."""
NEVER = 2**62
"""A step that no run reaches: points of earlier evaluations are not taken back."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is evaluated."""

    tasks: tuple[str, ...] = ()
    """Of lm-eval."""
    held_out: bool = True
    """Whether the evaluators of the recipe run, and one document by document."""
    include: Path | None = None
    few_shot: tuple[int, ...] = ()
    """Numbers of solved examples before each question, one after the other; as the task says if none."""
    limit: int | None = None
    """Questions of a task, documents of the held-out text."""
    overlap: int | None = None
    """Of evaluators of documents; as the recipe says, or 0, if not given."""
    batch: int | None = None
    """Questions, or windows of documents, at once; as the recipe says for its evaluators, or 16, if not
    given."""
    samples: Path | None = None
    """Folder for every question with its requests and answers."""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("overlap", 0), ("batch", 1), ("few_shot", 0)):
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and one < least:
                    raise ValueError(f"{name} = {one}: must be at least {least}")
        if not self.tasks:
            if not self.held_out:
                raise ValueError("held_out = False: without tasks there is nothing to evaluate")
            for name in ("few_shot", "samples", "include"):
                if (value := getattr(self, name)) not in (None, ()):
                    raise ValueError(f"{name} = {value}: is of tasks, and there are none; give --tasks")
        if self.overlap is not None and not self.held_out:
            raise ValueError(
                f"overlap = {self.overlap}: is of held-out text, and there is none; give --held-out"
            )

    @property
    def documents(self) -> list[str]:
        """What the recipe needs to have the evaluator of documents."""
        return [f'evaluators.{DOCUMENTS}.kind="{DOCUMENTS}"'] if self.held_out else []

    def settings_of(self, evaluators: Mapping[str, Evaluator]) -> list[str]:
        """What a recipe with these evaluators needs to have each heed what is wanted."""
        return [
            f"evaluators.{json.dumps(name)}.{option}={value}"
            for name, one in evaluators.items()
            for setting, option in OPTIONS.get(kind_of(one), {}).items()
            if (value := getattr(self, setting)) is not None
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What each figure depends on, as JSON."""
        include = None if self.include is None else str(self.include)
        return {"limit": self.limit, "overlap": self.overlap, "batch": self.batch, "include": include}


def evaluate(
    run: Path,
    wanted: Wanted,
    *,
    thoughts: Sequence[int] | None = None,
    iterations: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    trust_imports: bool = False,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a run, or one of its checkpoints, at every number of thoughts with every number of
    iterations; None stands for the recipe's own. Shows a table; every figure is in a line of `out`,
    evaluation.jsonl in the run's directory if not given, as soon as it is known, with the settings it was
    asked for with, and a point in TensorBoard, among those of the same settings.

    Raises ValueError, before anything is computed, for counts that the recurrence cannot have.
    """
    folder, _ = locate(run)
    settings = [
        (count, iterated)
        for count in (thoughts if thoughts else [None])
        for iterated in (iterations if iterations else [None])
    ]
    asked = {"set": list(overrides), **wanted.settings}
    results: list[dict[str, Any]] = []
    path = out or folder / RESULTS
    recipe = recipe_of(run, overrides=[*wanted.documents, *overrides], trust_imports=trust_imports)
    changes = [*wanted.documents, *wanted.settings_of(recipe.named("evaluator")), *overrides]
    recipe = recipe_of(run, overrides=changes, trust_imports=trust_imports)
    recipes = [counted(recipe, *setting) for setting in settings]  # all of them before the first is loaded
    if wanted.tasks:
        backbone: Backbone = recipe.component("backbone")
        harness.check_tasks(
            wanted.tasks,
            context=backbone.shape.context,
            include=wanted.include,
            few_shot=wanted.few_shot or (None,),
        )
    check_writable(path)
    if wanted.samples is not None:
        make_folder(wanted.samples)
    # Whether the recipe has the evaluator of documents without anybody's asking for it.
    unasked = (
        wanted.held_out
        and wanted.overlap is None
        and DOCUMENTS not in read_table(folder).get("evaluators", {})
        and not any(change.startswith(f"evaluators.{DOCUMENTS}") for change in overrides)
    )
    _, checkpoint = saved(run, recipe)  # one for all settings: a run that goes on saves others meanwhile
    for (count, iterated), with_counts in zip(settings, recipes, strict=True):
        subject = subject_of(checkpoint, with_counts, device=device)
        if unasked and not any(subject.source.validation_documents(wanted.limit)):
            warn(
                "no whole document lies in the held-out text: the evaluator 'documents' is left out; prepare "
                "the data with --validation-fraction to have it"
            )
            recipe, unasked = _without_documents(recipe), False
        setting = {"thoughts": count, "iterations": iterated}
        about = {"run": str(run), "step": subject.step, **setting, "settings": asked}
        values: dict[str, float] = {}
        for name, shots, figures in _figures(subject, recipe, wanted, _named(setting)):
            curve = f"{name}/{shots}shot" if wanted.few_shot and shots is not None else name
            values |= {f"{curve}/{metric}": value for metric, value in figures.items()}
            row = {**about, "evaluator": name, **({} if shots is None else {"few_shot": shots}), **figures}
            results.append(row)
            if not errors.is_terminal:
                _say(curve, setting, figures)
            append_line(path, json.dumps(row))
        curves = _curves_name({**setting, "limit": wanted.limit, "overlap": wanted.overlap}, overrides)
        _log(recipe, folder / "evaluation" / curves, subject.step, values)
    _show(results, settings)
    say(f"wrote {path}")
    return results


def _without_documents(recipe: Recipe) -> Recipe:
    evaluators = {name: one for name, one in recipe.named("evaluator").items() if name != DOCUMENTS}
    return replace(recipe, components={**recipe.components, "evaluator": evaluators})


def _named(setting: Mapping[str, int | None]) -> str:
    return "_".join(f"{name}{value}" for name, value in setting.items() if value is not None)


def _curves_name(setting: Mapping[str, int | None], overrides: Sequence[str]) -> str:
    """The folder of curves that one setting adds to, since figures of another are no points of them: one
    folder's name, whatever the overrides hold."""
    name = quote("_".join(filter(None, [_named(setting), *overrides])), safe="=") or "as_trained"
    if len(name) > LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = f"{name[: LONGEST - len(digest) - 1]}_{digest}"
    return name


def _figures(
    subject: EvaluationSubject, recipe: Recipe, wanted: Wanted, setting: str
) -> Iterator[tuple[str, int | None, dict[str, float]]]:
    """An evaluator or a task, the number of solved examples before each question of a task, and figures."""
    if wanted.held_out:
        preflight.check_evaluators(recipe, subject)
        evaluators: dict[str, Evaluator] = recipe.named("evaluator")
        for name, one in evaluators.items():
            with errors.status(name):
                found = figures_of(name, one, subject)
            numbers = {key: value for key, value in found.items() if not isinstance(value, str)}
            if numbers:
                yield name, None, numbers
    if not wanted.tasks:
        return
    for shots in wanted.few_shot or (None,):
        results = harness.run_tasks(
            subject,
            wanted.tasks,
            include=wanted.include,
            few_shot=shots,
            limit=wanted.limit,
            batch=wanted.batch or harness.BATCH,
            samples=wanted.samples is not None,
        )
        given = "" if shots is None else f"{shots}shot"
        for task, samples in results.samples.items():
            assert wanted.samples is not None
            file = wanted.samples / f"{'_'.join(filter(None, (task, setting, given)))}.jsonl"
            lines = [json.dumps(sample, default=str) for sample in samples]
            with naming(file):
                file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for task, figures in results.figures.items():
            yield task, results.few_shot.get(task), figures


def _log(recipe: Recipe, folder: Path, step: int, values: dict[str, float]) -> None:
    """A point of each figure for whoever writes metrics of this recipe, beside those of earlier calls; none
    in a run that may only be read."""
    metrics: dict[str, Metrics] = recipe.named("metrics")
    try:
        with naming(folder):
            for one in metrics.values():
                writer = one.build(folder, NEVER)
                writer.log(step, values)
                writer.close()
    except CannotWrite as error:
        warn(f"{error}: no curves of these figures")


def _say(curve: str, setting: Mapping[str, int | None], figures: Mapping[str, float]) -> None:
    """A line as soon as an evaluator is done, for who waits where nothing moves."""
    counts = [f"{name} {value}" for name, value in setting.items() if value is not None]
    numbers = [f"{key} {_shown(value)}" for key, value in figures.items() if not key.endswith(STDERR)]
    errors.print(f"{', '.join([*counts, curve])}: {'  '.join(numbers)}", markup=False, soft_wrap=True)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _show(rows: Sequence[dict[str, Any]], settings: Sequence[tuple[int | None, int | None]]) -> None:
    names = ("thoughts", "iterations")
    given = [name for at, name in enumerate(names) if any(setting[at] is not None for setting in settings)]
    about = {"run", "step", "settings", "evaluator", "few_shot", *names}
    lines = []
    for row in rows:
        for metric, value in row.items():
            if metric in about or metric.endswith(STDERR):
                continue
            error = row.get(f"{metric}{STDERR}")
            shown = _shown(value) + (f" ± {error:.4f}" if error else "")
            name = row["evaluator"] + (f", {row['few_shot']}-shot" if "few_shot" in row else "")
            lines.append([*(str(row[count]) for count in given), name, metric, shown])
    step = rows[0]["step"] if rows else 0
    table(f"{rows[0]['run'] if rows else ''}, step {step}", [*given, "evaluator", "metric", "value"], lines)
