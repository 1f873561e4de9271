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
from lattice.compare import Group, Run, Spread, check_comparable, evaluators_of, groups_of
from lattice.console import say, table
from lattice.recipe import Recipe


def report(
    runs: Sequence[Run],
    out: Path | None,
    *,
    title: str = "comparison",
    evaluator: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Shows finished runs as one table of arms and returns its figures; with `out` also writes
    comparison.json, the pictures and report.html there. `notes` are remarks on arms, by name.

    Raises ValueError where the runs do not compare.
    """
    if not runs:
        raise ValueError("there is no finished run to compare")
    check_comparable(runs)
    evaluators = evaluators_of(runs, evaluator)
    groups = groups_of(runs)
    columns, rows = _table(groups, evaluators)
    table(title, columns, rows)
    figures = [group.row(evaluators) for group in groups]
    if out is not None:
        _write(out, title, groups, evaluators, figures, notes or {})
    return figures


def _table(groups: Sequence[Group], evaluators: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    byte_key = f"{evaluators[0]}_bits_per_byte"
    with_bytes = all(byte_key in run.summary for group in groups for run in group.runs)
    columns = [
        "arm",
        "seeds",
        *[f"{name} loss" for name in evaluators],
        *(["bits/byte"] if with_bytes else []),
    ]
    columns += ["parameters", "in layers", "tokens", "train MFLOP/tok", "train PFLOP", "infer MFLOP/tok"]
    columns += ["tok/s", "MiB"]
    rows = []
    for group in groups:
        costs = group.costs
        rows.append(
            [
                group.name,
                str(len(group.runs)),
                *[_spread(group.of(f"{name}_loss")) for name in evaluators],
                *([_spread(group.of(byte_key))] if with_bytes else []),
                f"{costs.parameters / 1e6:,.2f} M",
                f"{costs.layer_parameters / 1e6:,.2f} M",
                f"{group.tokens / 1e6:,.1f} M",
                f"{costs.training_operations / 1e6:,.1f}",
                f"{group.training_operations / 1e15:,.3f}",
                f"{costs.inference_operations / 1e6:,.2f}",
                f"{group.tokens_per_second.mean:,.0f}",
                f"{group.of('peak_memory_mib').mean:,.0f}",
            ]
        )
    return columns, rows


def _spread(value: Spread) -> str:
    return f"{value.mean:.4f}" + (f" ± {value.half:.4f}" if value.high > value.low else "")


def _write(
    out: Path,
    title: str,
    groups: Sequence[Group],
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
    page = _page(title, groups, evaluators, drawn, notes)
    atomic.write_file(out / "report.html", page.encode())
    say("wrote " + ", ".join(str(path) for path in [*written, out / "report.html"]))


def _page(
    title: str,
    groups: Sequence[Group],
    evaluators: Sequence[str],
    drawn: Mapping[str, tuple[str, bytes]],
    notes: Mapping[str, str],
) -> str:
    template = importlib.resources.files("lattice").joinpath("templates/report.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    columns, rows = _table(groups, evaluators)
    return environment.from_string(template).render(
        title=title,
        version=__version__,
        columns=columns,
        rows=rows,
        pictures=[(caption, base64.b64encode(png).decode()) for caption, png in drawn.values()],
        arms=[
            (group, _differences(groups[0].recipe, group.recipe), notes.get(group.name)) for group in groups
        ],
        base=groups[0],
        hardware=sorted({run.summary["provenance"]["hardware"] for group in groups for run in group.runs}),
    )


def _differences(base: Recipe, other: Recipe) -> list[str]:
    """Keys of the other recipe that are not the base's, as they would stand in a recipe."""
    before, after = _leaves(base.table()), _leaves(other.table())
    changed = {key: value for key, value in after.items() if before.get(key) != value and key != "run.seed"}
    return [f"{key} = {json.dumps(value)}" for key, value in changed.items()]


def _leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return leaves
