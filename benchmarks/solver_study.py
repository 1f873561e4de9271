"""Does a model trained with the cheaper solver of the thoughts become as good, decoded in sequence?

    python benchmarks/solver_study.py [--steps 240] [--thoughts 1 3] [--seeds 0 1]

Small models learn the source of Python's standard library (the embedded text). Each thought count is trained
with Jacobi iteration, the paper's, and with Gauss-Seidel sweeps: on equal data, and, since sweeps cost fewer
token-passes, on as much more data as makes the training FLOPs equal. Every model is evaluated by the loss of
strictly sequential decoding. A run that was interrupted is taken up again; finished ones are kept in --runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lattice

RESULTS = Path(__file__).parent / "results" / "solver_study.jsonl"
MODEL: dict[str, Any] = {
    "run": {"batch_tokens": 1024, "sequence_tokens": 128, "log_every": 50},
    "backbone": {
        "kind": "gpt_neox",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 1024,
        "max_position_embeddings": 256,
    },
    "tokenizer": {"kind": "bpe", "vocab_size": 1024},
    "data": {"kind": "embedded"},
    "optimizer": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.01},
    "schedule": {"kind": "cosine", "warmup": 0.05},
    "checkpoint": {"kind": "dcp", "every": 100, "keep": 1},
    "evaluators": {
        "validation": {"kind": "perplexity", "every": 0, "max_tokens": 16_384},
        "sequential": {"kind": "perplexity", "every": 0, "max_tokens": 16_384, "sequential": True},
    },
}
PLAIN = {"kind": "none"}
SOLVERS = {
    "jacobi": {"solver": "jacobi", "jacobi": {"train": [2, 4], "eval": 3}},
    "gauss_seidel": {"solver": "gauss_seidel", "gauss_seidel": {"train": [1, 2], "eval": 2}},
}


def thinking(thoughts: int, solver: str) -> dict[str, Any]:
    return {"kind": "latent_thoughts", "thoughts": thoughts, **SOLVERS[solver]}


def cost(recurrence: dict[str, Any]) -> float:
    """Mean token-passes a token of a training step."""
    recipe = lattice.load_recipe({**MODEL, "recurrence": recurrence})
    shape = recipe.component("backbone").shape
    return float(recipe.component("recurrence").token_passes(shape, training=True))


def arms(steps: int, counts: list[int]) -> dict[str, tuple[dict[str, Any], int]]:
    """Name -> recurrence and number of steps."""
    found: dict[str, tuple[dict[str, Any], int]] = {"plain": (PLAIN, steps)}
    for thoughts in counts:
        jacobi, sweeps = thinking(thoughts, "jacobi"), thinking(thoughts, "gauss_seidel")
        found[f"K={thoughts} jacobi"] = jacobi, steps
        found[f"K={thoughts} gauss_seidel"] = sweeps, steps
        equal = round(steps * cost(jacobi) / cost(sweeps))
        found[f"K={thoughts} gauss_seidel, equal FLOPs"] = sweeps, equal
    return found


def train(name: str, recurrence: dict[str, Any], steps: int, seed: int, runs: Path) -> dict[str, Any]:
    run = {**MODEL["run"], "seed": seed, "steps": steps}
    folder = runs / f"{name.replace(' ', '_').replace(',', '')}_seed{seed}"
    summary = lattice.train({**MODEL, "run": run, "recurrence": recurrence}, out=folder)
    if "stopped_at" in summary:
        raise SystemExit(130)
    return {
        "benchmark": "solver_study",
        "arm": name,
        "seed": seed,
        "steps": steps,
        "tokens": summary["tokens"],
        "token_passes": cost(recurrence) * summary["tokens"],
        "seconds": summary["seconds"],
        "parameters": summary["parameters"],
        "loss_parallel": summary["validation_loss"],
        "loss_sequential": summary["sequential_loss"],
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("arm", "steps", "token-passes", "seconds", "loss, parallel", "loss, in sequence", "seeds")
    for arm, group in itertools.groupby(sorted(rows, key=lambda row: row["arm"]), key=lambda row: row["arm"]):
        of = list(group)

        def mean(key: str, of: list[dict[str, Any]] = of) -> str:
            values = [row[key] for row in of]
            half = (max(values) - min(values)) / 2
            return f"{statistics.mean(values):.4f} ± {half:.4f}"

        seconds = statistics.mean(row["seconds"] for row in of)
        passes = f"{of[0]['token_passes'] / 1e6:.2f} M"
        columns = [arm, str(of[0]["steps"]), passes, f"{seconds:.0f}"]
        table.add_row(*columns, mean("loss_parallel"), mean("loss_sequential"), str(len(of)))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--thoughts", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/solver_study"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    rows = []
    for seed in arguments.seeds:
        for name, (recurrence, steps) in arms(arguments.steps, arguments.thoughts).items():
            rows.append(train(name, recurrence, steps, seed, arguments.runs))
            show(rows)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
