"""Pictures of runs and comparisons; matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lattice.compare import Group, Spread, families_of
from lattice.run_folder import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.5
"""Inches of a picture."""
SMOOTHED = 50
"""Steps over which a training curve is averaged."""


class NoMatplotlib(ImportError):
    """Pictures were asked for and cannot be drawn."""


def pyplot() -> Any:
    """matplotlib.pyplot for files. Raises NoMatplotlib that says what to install."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise NoMatplotlib("pictures need matplotlib: pip install 'lattice[plot]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


@contextmanager
def _figure(height: float = 4.5, panels: int = 1) -> Iterator[tuple[list[Axes], io.BytesIO]]:
    """Axes to draw on, one below the other and each of this height, and where the PNG will be."""
    plt, png = pyplot(), io.BytesIO()
    figure, grid = plt.subplots(
        panels, 1, figsize=(WIDTH, height * panels), layout="constrained", squeeze=False
    )
    for axes in grid[:, 0]:
        axes.grid(alpha=0.3)
    yield list(grid[:, 0]), png
    _name(figure)
    # Grows by the legend, however many it names: the axes keep their size.
    figure.savefig(png, dpi=130, format="png", bbox_inches="tight")
    plt.close(figure)


def comparison(groups: Sequence[Group], evaluator: str) -> dict[str, tuple[str, bytes]]:
    """Name -> what it shows and the PNG, of the pictures that these arms allow."""
    drawn = {
        "loss_by_tokens": (
            "Validation loss against training tokens; bands span the seeds.",
            _curves(groups, evaluator, "training tokens", lambda group, tokens: tokens),
        ),
        "loss_by_training_flops": (
            "The same against training FLOPs, by the ledger.",
            _curves(groups, evaluator, "training FLOPs", Group.training_operations_by),
        ),
        "loss_by_inference_flops": (
            "Final loss against what a token costs in sequential decoding; lines join thought counts.",
            _against(
                groups,
                evaluator,
                "inference MFLOPs a token",
                lambda group: group.costs.inference_operations / 1e6,
            ),
        ),
    }
    counted = [group for group in groups if group.thoughts is not None]
    if len({group.thoughts for group in counted}) > 1:
        drawn["loss_by_thoughts"] = (
            "Final loss against the thinking steps before each token, as each recurrence counts them; "
            "lines join arms that differ in nothing else.",
            _against(
                counted,
                evaluator,
                "thinking steps before each token",
                lambda group: float(group.thoughts or 0),
            ),
        )
    if any(group.residuals for group in groups):
        drawn["residuals"] = (
            "Relative change of the thoughts at each iteration, over the last tenth of training.",
            _residuals(groups),
        )
    return drawn


def _curves(
    groups: Sequence[Group], evaluator: str, label: str, place: Callable[[Group, int], float]
) -> bytes:
    with _figure(5.5) as ([axes], png):
        for index, group in enumerate(groups):
            curves = [dict(zip(*run.curve(f"{evaluator}/loss"), strict=True)) for run in group.runs]
            tokens = sorted(set.intersection(*map(set, curves)))  # where all seeds were evaluated
            if not tokens:
                continue
            at = np.array([place(group, count) for count in tokens])
            losses = np.array([[curve[here] for here in tokens] for curve in curves])
            means = losses.mean(0)
            axes.plot(at, means, label=_label(group.name), **_style(index), **_sparse(means))
            axes.fill_between(at, losses.min(0), losses.max(0), alpha=0.15, color=_style(index)["color"])
        axes.set(xlabel=label, ylabel=f"{evaluator} loss, nats a token", xscale="log")
    return png.getvalue()


def _against(groups: Sequence[Group], evaluator: str, label: str, place: Callable[[Group], float]) -> bytes:
    with _figure() as ([axes], png):
        for index, group in enumerate(groups):
            loss: Spread = group.of(f"{evaluator}_loss")
            below, above = loss.mean - loss.low, loss.high - loss.mean
            axes.errorbar(
                place(group),
                loss.mean,
                [[below], [above]],
                capsize=3,
                label=_label(group.name),
                **(_style(index) | {"linestyle": "none"}),
            )
        for family in families_of(groups):
            points = [(place(group), group.of(f"{evaluator}_loss").mean) for group in family]
            axes.plot(*zip(*points, strict=True), color="0.6", linewidth=1, zorder=0)
        axes.set(xlabel=label, ylabel=f"{evaluator} loss, nats a token")
        if all(place(group).is_integer() for group in groups):
            axes.locator_params("x", integer=True)
    return png.getvalue()


def _residuals(groups: Sequence[Group]) -> bytes:
    with _figure() as ([axes], png):
        for index, group in enumerate(groups):
            means = group.residuals
            if means:
                axes.plot(range(1, len(means) + 1), means, label=_label(group.name), **_style(index))
        axes.set(xlabel="iteration", ylabel="relative change of the thoughts", yscale="log")
        axes.locator_params("x", integer=True)
    return png.getvalue()


def _style(index: int, *, marked: bool = True) -> dict[str, Any]:
    """Ten colours, then the same ones with another kind of line, of which there are four; eight markers."""
    return {
        "color": f"C{index % 10}",
        "linestyle": ("-", "--", ":", "-.")[index // 10 % 4],
        "marker": "osD^vPX*"[index % 8] if marked else "",
        "markersize": 5,
    }


def _sparse(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Markers of a line of many points: apart by a twentieth of the axes' diagonal, not one band. Those that
    are not finite are not drawn, and matplotlib fails to space none."""
    return {"markevery": 0.05 if np.isfinite(values).sum() > 20 else None}


def _label(name: str) -> str:
    """As it is: between dollars matplotlib would read mathematics, and a name that begins with _ it would
    leave out."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _name(figure: Figure) -> None:
    """One legend of all panels below them, in as many columns as there is room for."""
    named = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        columns = max(1, int(WIDTH / (0.6 + 0.065 * max(map(len, named)))))  # inches: a line and its label
        figure.legend(
            list(named.values()),
            list(named),
            ncols=columns,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
        )


def curves(folders: Sequence[Path], keys: Sequence[str] | None = None) -> bytes:
    """Metrics of any runs, finished or not, against training tokens, one panel for each key; `loss` and every
    evaluator's loss if no keys are given. Raises ValueError for a key that no run has."""
    runs = zip(_apart(folders), folders, strict=True)
    rows = {name: read_metrics(folder / METRICS) for name, folder in runs}
    known = {key for lines in rows.values() for row in lines for key, value in row.items() if _number(value)}
    wanted = keys or sorted(key for key in known if key == "loss" or key.endswith("/loss"))
    for key in wanted:
        if key not in known and any(key in row for lines in rows.values() for row in lines):
            raise ValueError(f"the metric '{key}' is no single number, which alone can be drawn")
        if key not in known:
            raise ValueError(f"no run has the metric '{key}'. Known: {', '.join(sorted(known))}")
    if not wanted:
        raise ValueError("no run has a loss yet: there is nothing to draw")
    with _figure(3.2, len(wanted)) as (panels, png):
        for key, axes in zip(wanted, panels, strict=True):
            seldom = "/" in key  # an evaluator's, not each step's
            for index, (name, lines) in enumerate(rows.items()):
                points = [(row["tokens"], row[key]) for row in lines if key in row]
                if points:
                    tokens, values = zip(*points, strict=True)
                    shown = np.array(values) if seldom else _smoothed(np.array(values))
                    style = _style(index, marked=seldom) | _sparse(shown)
                    axes.plot(tokens, shown, label=_label(name), **style)
            label = key if seldom else f"{key}, mean of {SMOOTHED} steps"
            axes.set(xlabel="training tokens", ylabel=label)
    return png.getvalue()


def _apart(folders: Sequence[Path]) -> list[str]:
    """What tells directories from each other: their paths without the beginning that all share."""
    absolute = [folder.absolute() for folder in folders]
    shared = os.path.commonpath([folder.parent for folder in absolute]) if absolute else ""
    return [str(folder.relative_to(shared)) for folder in absolute]


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _smoothed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean of each value and those before it, SMOOTHED at most, of those that are finite; NaN where none
    is."""
    finite = np.isfinite(values)
    sums, counts = (np.cumsum([0.0, *of]) for of in (np.where(finite, values, 0.0), finite))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - SMOOTHED)
    with np.errstate(invalid="ignore"):
        return np.asarray((sums[stop] - sums[start]) / (counts[stop] - counts[start]))
