"""What `lattice compare` and `lattice sweep` show: a table, json, pictures, and all of it on one page."""

from __future__ import annotations

import base64
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lattice import __version__, atomic, pictures
from lattice.compare import LOSS, Group, Run, Spread, base_of, check_comparable, evaluators_of, groups_of
from lattice.console import say, table, warn
from lattice.recipe import Recipe
from lattice.run_folder import leaves

COUNTED = ("", "k", "M", "B", "T")
"""Thousands of tokens and of parameters, as the field writes them."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
"""Of units."""


def report(
    runs: Sequence[Run],
    out: Path | None,
    *,
    title: str = "comparison",
    evaluator: str | None = None,
    notes: Mapping[str, str] | None = None,
    first_is_base: bool = False,
) -> list[dict[str, Any]]:
    """Shows finished runs as one table of arms and returns its figures; with `out` also writes
    comparison.json, the pictures and report.html there. `notes` are remarks on arms, by name. The base,
    against which the others are shown, is the arm that differs least from all, or the first.

    Raises ValueError where the runs do not compare.
    """
    if not runs:
        raise ValueError("there is no finished run to compare")
    check_comparable(runs)
    evaluators = evaluators_of(runs, evaluator)
    groups = groups_of(runs)
    base = groups[0] if first_is_base else base_of(groups)
    for shown, (columns, *rows) in _tables(groups, base, evaluators).items():
        table(f"{title}: {shown}", columns, rows)
    for group in groups:
        for step, steps in group.runs[0].earlier_ends:
            warn(
                f"arm '{group.name}': had {steps} steps until step {step}: its learning rate has followed "
                "several schedules"
            )
    figures = [group.row(evaluators, base) for group in groups]
    if out is not None:
        _write(out, title, groups, base, evaluators, figures, notes or {})
    return figures


def _tables(groups: Sequence[Group], base: Group, evaluators: Sequence[str]) -> dict[str, list[list[str]]]:
    """What was reached and what it cost: by title, the names of the columns and a row for each arm."""
    byte_key = f"{evaluators[0]}_bits_per_byte"
    with_bytes = all(byte_key in run.summary for group in groups for run in group.runs)
    first, *others = evaluators
    arms = ["arm", *(group.name for group in groups)]
    costs = [group.costs for group in groups]
    against = [
        _by_seed(group.against(base, f"{first}{LOSS}")) if group is not base else "" for group in groups
    ]
    losses = [
        arms,
        ["seeds", *(str(len(group.runs)) for group in groups)],
        _scaled("tokens, {}", [group.tokens for group in groups], COUNTED),
        _scaled("{}FLOP", [group.training_operations for group in groups]),
        _losses(groups, first),
        [f"against {base.name}", *against],
        *(_losses(groups, name) for name in others),
    ]
    if with_bytes:
        losses.append(["bits/byte", *(f"{group.of(byte_key).mean:.4f}" for group in groups)])
    spent = [
        arms,
        _scaled("params, {}", [cost.parameters for cost in costs], COUNTED),
        _scaled("in layers, {}", [cost.layer_parameters for cost in costs], COUNTED),
        _scaled("train {}FLOP", [cost.training_operations for cost in costs]),
        _scaled("infer {}FLOP", [cost.inference_operations for cost in costs]),
        ["tok/s", *(f"{group.tokens_per_second.mean:,.0f}" for group in groups)],
        ["MiB", *(f"{group.of('peak_memory_mib').mean:,.0f}" for group in groups)],
    ]
    return {
        "loss, nats a token, and what training took": _transposed(losses),
        "cost, FLOPs a token": _transposed(spent),
    }


def _transposed(columns: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(row) for row in zip(*columns, strict=True)]


def _losses(groups: Sequence[Group], evaluator: str) -> list[str]:
    return [evaluator, *(_spread(group.of(f"{evaluator}{LOSS}")) for group in groups)]


def _scaled(name: str, values: Sequence[float], prefixes: Sequence[str] = PREFIXES) -> list[str]:
    """A column of counts to three digits: its name with one of the prefixes, the largest of which every value
    is at least one, and the values so divided."""
    least = min(values)
    power = max((power for power in range(len(prefixes)) if 1000**power <= least), default=0)
    shown = (_three_digits(value / 1000**power) for value in values)
    return [name.format(prefixes[power]).removesuffix(", "), *shown]


def _three_digits(value: float) -> str:
    """At least, and without an exponent."""
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded value
    return f"{value:,.{max(0, 2 - exponent)}f}"


def _by_seed(differences: Sequence[float | None]) -> str:
    return ", ".join("none" if value is None else f"{value:+.4f}" for value in differences)


def _spread(value: Spread) -> str:
    return f"{value.mean:.4f}" + (f" ± {value.half:.4f}" if value.high > value.low else "")


def _write(
    out: Path,
    title: str,
    groups: Sequence[Group],
    base: Group,
    evaluators: Sequence[str],
    figures: list[dict[str, Any]],
    notes: Mapping[str, str],
) -> None:
    atomic.write_json(out / "comparison.json", figures)
    written = [out / "comparison.json"]
    try:
        drawn = pictures.comparison(groups, evaluators[0])
    except pictures.NoMatplotlib as error:
        say(f"no pictures: {error}")
        drawn = {}
    for name, (_, png) in drawn.items():
        atomic.write_file(out / f"{name}.png", png)
        written.append(out / f"{name}.png")
    page = _page(title, groups, base, evaluators, drawn, notes)
    atomic.write_file(out / "report.html", page.encode())
    say("wrote " + ", ".join(str(path) for path in [*written, out / "report.html"]))


def _page(
    title: str,
    groups: Sequence[Group],
    base: Group,
    evaluators: Sequence[str],
    drawn: Mapping[str, tuple[str, bytes]],
    notes: Mapping[str, str],
) -> str:
    template = importlib.resources.files("lattice").joinpath("templates/report.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=title,
        version=__version__,
        tables=_tables(groups, base, evaluators),
        pictures=[(caption, base64.b64encode(png).decode()) for caption, png in drawn.values()],
        arms=[(group, _differences(base.recipe, group.recipe), notes.get(group.name)) for group in groups],
        base=base,
        hardware=sorted({run.summary["provenance"]["hardware"] for group in groups for run in group.runs}),
    )


def _differences(base: Recipe, other: Recipe) -> list[str]:
    """What the other recipe has that is not the base's, as it would stand in a recipe, and what of the base
    it lacks, but for options of a kind that it has replaced."""
    before, after = leaves(base.table()), leaves(other.table())
    changed = {key: value for key, value in after.items() if before.get(key) != value and key != "run.seed"}
    kinds = [key for key in before if key.endswith(".kind") and before[key] != after.get(key)]
    replaced = tuple(key.removesuffix("kind") for key in kinds)
    lacking = [key for key in before if key not in after and (key in kinds or not key.startswith(replaced))]
    return [
        *(f"{key} = {json.dumps(value)}" for key, value in changed.items()),
        *(f"{key}: unset" for key in lacking),
    ]
