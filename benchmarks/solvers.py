"""What a solver of the thoughts buys: error of the predicting hidden states against cost.

    python benchmarks/solvers.py [--thoughts 1 2 3 5] [--out benchmarks/results/solvers.jsonl]

For random and for trained weights (small models that learn the source of Python's standard library, the
embedded text): relative error against the sequential definition, token-passes a token, and the time of one
forward without gradients. Errors are computed in float64, times measured in float32, solvers in turn, median
of --repetitions. Writes jsonl and, with matplotlib installed, a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from solver_candidates import anderson, chunks
from solver_study import MODEL, thinking
from torch import Tensor

import lattice
from lattice.assemble import cache_folder
from lattice.components.recurrence._iterations import GaussSeidel, Jacobi
from lattice.components.recurrence.latent_thoughts import LatentThoughts
from lattice.load import codec_of, recipe_of
from lattice.protocols import Batch, DataRequest

RESULTS = Path(__file__).parent / "results" / "solvers.jsonl"
Solve = Callable[[lattice.LanguageModel, Tensor], Tensor]


def trained(thoughts: int, steps: int, runs: Path) -> lattice.LanguageModel:
    """By the paper's solver, so that the others have no advantage."""
    recipe = {**MODEL, "run": {**MODEL["run"], "steps": steps}, "recurrence": thinking(thoughts, "jacobi")}
    recipe["evaluators"] = {"validation": {**MODEL["evaluators"]["validation"], "max_tokens": 8192}}
    lattice.train(recipe, out=runs / f"K={thoughts}")
    return lattice.load(runs / f"K={thoughts}")


def held_out(thoughts: int, runs: Path, rows: int, length: int) -> Tensor:
    """Windows of the validation text."""
    recipe = recipe_of(runs / f"K={thoughts}")
    codec = codec_of(runs / f"K={thoughts}")
    request = DataRequest(
        codec=codec,
        cache=cache_folder(),
        sequence_tokens=length,
        micro_batch=rows,
        batch=rows,
        documents=False,
        seed=0,
    )
    source = recipe.component("data").open(request)
    batch: Batch = next(iter(source.validation(rows * length)))
    return batch.ids_BL


def predicting(model: lattice.LanguageModel, ids_BL: Tensor, **options: Any) -> Tensor:
    """The hidden states that predict, by a recurrence with these options."""
    model.unroll = LatentThoughts(**options).build(model.shape)
    seen: list[Tensor] = []
    hook = model.decoder.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with hook:
        model(ids_BL)
    return seen[0]


def solvers(thoughts: int) -> Iterator[tuple[str, float, Solve]]:
    """Name, token-passes a token, and the solver."""
    warm, known = thoughts * (thoughts + 1) / 2, partial(predicting, thoughts=thoughts)
    for count in range(3 * thoughts + 2):
        jacobi = partial(known, jacobi=Jacobi(eval=count))
        yield "jacobi", warm + (count + 1) * (thoughts + 1), jacobi
    for count in range(6):
        sweeps = partial(known, solver="gauss_seidel", gauss_seidel=GaussSeidel(eval=count))
        yield "gauss_seidel", (count + 1) * (thoughts + 1), sweeps
        in_chunks = partial(chunks, count=count, thoughts=thoughts, size=32)
        yield "gauss_seidel, chunks of 32", (count + 1) * (thoughts + 1), in_chunks
    for count in range(2, 3 * thoughts + 2):
        mixing = partial(anderson, count=count, thoughts=thoughts, memory=2)
        yield "jacobi, Anderson mixing", warm + (count + 1) * (thoughts + 1), mixing


def sequential(model: lattice.LanguageModel, ids_BL: Tensor) -> Tensor:
    """The definition, token after token through the cache."""
    seen: list[Tensor] = []
    hook = model.decoder.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cache = model.cache()
    with hook:
        for at in range(ids_BL.shape[1]):
            model.step(ids_BL[:, at : at + 1], cache)
    return torch.stack(seen, dim=1)


@torch.no_grad()
def measure(
    model: lattice.LanguageModel, ids_BL: Tensor, thoughts: int, weights: str, repetitions: int
) -> list[dict[str, Any]]:
    precise, quick = model.double().eval(), None
    model.unroll = LatentThoughts(thoughts=thoughts).build(model.shape)
    exact = sequential(precise, ids_BL)
    rows = []
    for name, cost, solve in solvers(thoughts):
        error = (solve(precise, ids_BL) - exact).norm() / exact.norm()
        rows.append({"solver": name, "token_passes": cost, "error": error.item(), "seconds": []})
    quick = model.float()
    for repetition in range(repetitions + 1):
        for row, (_, _, solve) in zip(rows, solvers(thoughts), strict=True):
            start = time.perf_counter()
            solve(quick, ids_BL)
            if repetition:  # the first is to warm up
                row["seconds"].append(time.perf_counter() - start)
    about = {
        "benchmark": "solvers",
        "weights": weights,
        "thoughts": thoughts,
        "batch": list(ids_BL.shape),
        "repetitions": repetitions,
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    for row in rows:
        low, median, high = statistics.quantiles(row["seconds"], n=4)
        row |= about | {"seconds": median, "seconds_quartiles": [low, high]}
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    title = f"{first['weights']} weights, K = {first['thoughts']}, batch {first['batch']}"
    table = Table("solver", "token-passes", "error", "milliseconds", title=title)
    for row in sorted(rows, key=lambda row: (row["solver"], row["token_passes"])):
        cells = f"{row['token_passes']:g}", f"{row['error']:.1e}", f"{1000 * row['seconds']:.0f}"
        table.add_row(row["solver"], *cells)
    Console(width=100).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    counts = sorted({row["thoughts"] for row in rows})
    kinds = sorted({row["weights"] for row in rows})
    columns = [(weights, axis) for weights in kinds for axis in ("token_passes", "seconds")]
    figure, axes = pyplot.subplots(
        len(counts), len(columns), figsize=(4 * len(columns), 2.8 * len(counts)), squeeze=False
    )
    for line, thoughts in zip(axes, counts, strict=True):
        for axis, (weights, cost) in zip(line, columns, strict=True):
            for solver in sorted({row["solver"] for row in rows}):
                points = sorted(
                    (row[cost], row["error"])
                    for row in rows
                    if (row["thoughts"], row["weights"], row["solver"]) == (thoughts, weights, solver)
                )
                axis.plot(*zip(*points, strict=True), marker=".", label=solver)
            axis.set(yscale="log", xlabel=cost.replace("_", "-"), title=f"{weights} weights, K = {thoughts}")
            axis.grid(alpha=0.3)
        line[0].set_ylabel("relative error")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thoughts", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--batch", type=int, nargs=2, default=[8, 128])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/solvers"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    rows = []
    for thoughts in arguments.thoughts:
        taught = trained(thoughts, arguments.steps, arguments.runs)
        ids_BL = held_out(thoughts, arguments.runs, *arguments.batch)
        fresh = lattice.build_model(
            {"backbone": MODEL["backbone"], "recurrence": thinking(thoughts, "jacobi")}
        )
        for weights, model in (("random", fresh), ("trained", taught)):
            rows += measure(model, ids_BL, thoughts, weights, arguments.repetitions)
            show([row for row in rows if (row["thoughts"], row["weights"]) == (thoughts, weights)])
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
