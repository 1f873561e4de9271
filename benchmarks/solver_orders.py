"""Is there a better order than sweeping the stages one after the other, or does extrapolating help?

    python benchmarks/solver_orders.py [--thoughts 3] [--passes 9]

All orders of at most --passes passes, each over one stage of all tokens with the newest keys and values of
the others, on the random and trained weights of solvers.py: error of the predicting hidden states against the
sequential definition. Then for each further sweep the cosine between the errors before and after it, and what
the best step along their difference, which nobody knows beforehand, would leave of the error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from solver_candidates import embedded, stack_of
from solver_study import MODEL, thinking
from solvers import held_out, sequential, trained
from torch import Tensor

import lattice
from lattice.components.recurrence.latent_thoughts import LatentThoughts

RESULTS = Path(__file__).parent / "results" / "solver_orders.jsonl"
SHOWN = 3
SWEEPS = 8


def orders(thoughts: int, passes: int, begun: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Those that end with the stage that predicts. A stage twice running would change nothing."""
    if begun and begun[-1] == thoughts:
        yield begun
    if len(begun) < passes:
        for stage in range(min(len(set(begun)), thoughts) + 1):
            if begun[-1:] != (stage,):
                yield from orders(thoughts, passes, (*begun, stage))


def after(model: lattice.LanguageModel, ids_BL: Tensor, order: tuple[int, ...]) -> list[Tensor]:
    """The hidden states (B, L, 1, D) of every pass."""
    stack, cache = stack_of(model, ids_BL), model.cache()
    newest = {-1: embedded(model, stack, ids_BL)}
    states = []
    for stage in order:
        newest[stage] = stack.run(newest[stage - 1], first_stage=stage, cache=cache)
        states.append(newest[stage])
    return states


@torch.no_grad()
def search(model: lattice.LanguageModel, ids_BL: Tensor, thoughts: int, passes: int) -> list[dict[str, Any]]:
    """The best orders of each length, and the sweeps."""
    exact_BLD = sequential(model, ids_BL)
    found: dict[int, list[tuple[float, str]]] = {}
    for order in orders(thoughts, passes):
        error = (after(model, ids_BL, order)[-1].squeeze(2) - exact_BLD).norm() / exact_BLD.norm()
        found.setdefault(len(order), []).append((error.item(), "".join(map(str, order))))
    rows = []
    for length, errors in sorted(found.items()):
        sweeps = "".join(map(str, range(thoughts + 1))) * (length // (thoughts + 1))
        shown = sorted(errors)[:SHOWN] + [one for one in sorted(errors)[SHOWN:] if one[1] == sweeps]
        rows += [
            {"order": order, "token_passes": length, "of": len(errors), "error": e} for e, order in shown
        ]
    return rows


@torch.no_grad()
def extrapolated(model: lattice.LanguageModel, ids_BL: Tensor, thoughts: int) -> list[dict[str, Any]]:
    """Errors are against the fixed point to which many sweeps come."""
    states = after(model, ids_BL, tuple(range(thoughts + 1)) * SWEEPS)[thoughts :: thoughts + 1]
    rows = []
    for sweep in (1, 2):
        before, now = ((state - states[-1]).flatten() for state in states[sweep - 1 : sweep + 1])
        step = now - before
        best = now - step * (now @ step) / (step @ step)
        cosine = torch.nn.functional.cosine_similarity(before, now, dim=0)
        rows.append(
            {"sweeps": sweep, "cosine": cosine.item(), "left_by_best_step": (best.norm() / now.norm()).item()}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thoughts", type=int, default=3)
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--batch", type=int, nargs=2, default=[4, 128])
    parser.add_argument("--runs", type=Path, default=Path("runs/solvers"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    thoughts, rows = arguments.thoughts, []
    taught = trained(thoughts, arguments.steps, arguments.runs)
    ids_BL = held_out(thoughts, arguments.runs, *arguments.batch)
    fresh = lattice.build_model({"backbone": MODEL["backbone"], "recurrence": thinking(thoughts, "jacobi")})
    for weights, model in (("random", fresh), ("trained", taught)):
        model.eval().unroll = LatentThoughts(thoughts=thoughts).build(model.shape)
        found = search(model, ids_BL, thoughts, arguments.passes) + extrapolated(model, ids_BL, thoughts)
        about = {
            "benchmark": "solver_orders",
            "weights": weights,
            "thoughts": thoughts,
            "batch": arguments.batch,
        }
        rows += [row | about | {"torch": torch.__version__} for row in found]
        table = Table("order", "passes", "error", title=f"{weights} weights, K = {thoughts}")
        for row in found:
            if "order" in row:
                table.add_row(row["order"], str(row["token_passes"]), f"{row['error']:.2e}")
            else:
                left = f"{row['left_by_best_step']:.2f} of it left by the best step"
                table.add_row(f"after {row['sweeps']} further", "", f"cosine {row['cosine']:.2f}, {left}")
        Console(width=100).print(table)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
