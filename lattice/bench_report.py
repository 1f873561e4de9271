"""Results of `lattice bench`: a table, lines of jsonl, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lattice import pictures
from lattice.atomic import append_line, check_writable
from lattice.bench import Case, Options, bench
from lattice.console import say, table
from lattice.recipe import Recipe
from lattice.thought_counts import as_evaluated, own_thoughts, with_thoughts

Row = dict[str, Any]


def run_bench(
    recipes: dict[str, Recipe], thoughts: Sequence[int] | None, options: Options, out: Path | None
) -> list[Row]:
    """Measures every recipe at every thought count, the counts one after the other (None: as it is), shows
    the tables, and writes `bench.jsonl`, a line as soon as it is known, and `bench.png` to the folder `out`.
    """
    if out is not None:
        check_writable(out / "bench.jsonl")
    rows: list[Row] = []
    for cases in _in_turn(recipes, thoughts):
        for row in bench(cases, options):
            rows.append(row)
            if out is not None:
                append_line(out / "bench.jsonl", json.dumps(row))
    show(rows)
    if out is not None:
        say(f"wrote {out / 'bench.jsonl'}" + _picture(rows, out / "bench.png"))
    return rows


def _in_turn(recipes: dict[str, Recipe], thoughts: Sequence[int] | None) -> list[list[Case]]:
    """What takes turns: the recipes as they are, or those of each count. Counts that a recipe cannot have are
    left out, and said so; ValueError where it can have none."""
    if thoughts is None:
        as_they_are = [
            Case(label=label, thoughts=own_thoughts(recipe), recipe=as_evaluated(recipe))
            for label, recipe in recipes.items()
        ]
        return [as_they_are]
    counts = sorted(set(thoughts))
    if counts[0] < 0:
        raise ValueError(f"thoughts = {counts[0]}: must be at least 0")
    of_count: dict[int, list[Case]] = {count: [] for count in counts}
    for label, recipe in recipes.items():
        refused: list[str] = []
        for count in counts:
            try:
                counted = with_thoughts(recipe, count, drawn=False)
            except ValueError as error:
                refused.append(str(error))
            else:
                of_count[count].append(Case(label=label, thoughts=count, recipe=counted))
        if len(refused) == len(counts):
            raise ValueError(f"{label}: {refused[0]}")
        for problem in refused:
            say(f"{label} is left out: {problem}")
    return [cases for cases in of_count.values() if cases]


def show(rows: Sequence[Row]) -> None:
    """Tables of a terminal, narrow enough for names of recipes beside the figures: how fast and how large,
    where the time goes, and the operations."""
    first = rows[0]
    several = len({row["recipe"] for row in rows}) > 1
    measured = [row for row in rows if "error" not in row]
    say(
        f"{'' if several else first['recipe'] + ', '}{first['mode']}, batch {first['batch']} x "
        f"{first['length']} tokens, {first['precision']}\n{first['hardware']}, "
        f"torch {first['versions']['torch']}, medians of {first['repetitions']} (quartiles)"
    )

    def named(row: Row) -> list[str]:
        return [*([row["recipe"]] if several else []), str(row["thoughts"])]

    names = [*(["recipe"] if several else []), "K"]
    memory = ["memory", "process"] if any("peak_process_mib" in row for row in measured) else ["memory"]
    table(
        "throughput, and memory at its peak, MiB, by thoughts K",
        [*names, "tokens/s", *memory],
        [named(row) + _rates(row) for row in rows],
    )
    parts = list(measured[0]["seconds"]) if measured else []
    table("time, ms", [*names, *parts], [named(row) + _times(row, parts) for row in measured])
    columns = [*names, "passes/s", "MFLOP/tok", "GFLOP/s"]
    if any(row["mfu"] is not None for row in measured):
        columns.append("MFU")
    table("operations", columns, [named(row) + _operations(row) for row in measured])


def _rates(row: Row) -> list[str]:
    if "error" in row:
        return [row["error"]]
    rate = row["tokens_per_second"]
    digits = 0 if rate["median"] >= 100 else 1
    low, median, high = (f"{rate[name]:,.{digits}f}" for name in ("low", "median", "high"))
    memory = [f"{row[name]:,.0f}" for name in ("peak_memory_mib", "peak_process_mib") if name in row]
    return [f"{median} ({low} to {high})", *memory]


def _times(row: Row, parts: list[str]) -> list[str]:
    return [f"{1000 * row['seconds'][part]:,.1f}" for part in parts]


def _operations(row: Row) -> list[str]:
    return [
        f"{row['token_passes_per_second']:,.0f}",
        f"{row['operations_per_token'] / 1e6:,.1f}",
        f"{row['operations_per_second'] / 1e9:,.1f}",
        *([] if row["mfu"] is None else [f"{row['mfu']:.1%}"]),
    ]


def _picture(rows: Sequence[Row], path: Path) -> str:
    """Throughput and memory against the number of thoughts; says what came of it."""
    try:
        pyplot = pictures.pyplot()
    except pictures.NoMatplotlib as error:
        return f"; {error}"
    measured = [row for row in rows if "error" not in row]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for label in dict.fromkeys(row["recipe"] for row in measured):
        mine = sorted((row for row in measured if row["recipe"] == label), key=lambda row: row["thoughts"])
        counts = [row["thoughts"] for row in mine]
        rates = [row["tokens_per_second"] for row in mine]
        middle = [rate["median"] for rate in rates]
        below = [rate["median"] - rate["low"] for rate in rates]
        above = [rate["high"] - rate["median"] for rate in rates]
        speed.errorbar(counts, middle, [below, above], marker="o", capsize=3, label=label)
        memory.plot(counts, [row["peak_memory_mib"] for row in mine], marker="o", label=label)
    for axes, name in ((speed, "tokens a second"), (memory, "peak memory, MiB")):
        axes.axhline(0, linewidth=0)  # the room above the highest marker is a share of all from there
        axes.set(xlabel="thoughts", ylabel=name, ylim=(0, None))
        axes.set_xticks(sorted({row["thoughts"] for row in measured}))
        axes.grid(alpha=0.3)
    speed.legend()
    first = rows[0]
    figure.suptitle(
        f"{first['mode']}, batch {first['batch']} x {first['length']}, {first['hardware']}", size=9
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return f" and {path}"
