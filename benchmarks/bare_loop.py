"""What does the toolkit cost a plain model? Its training loop beside a bare one around the same backbone.

    python benchmarks/bare_loop.py [--pairs 20] [--out benchmarks/results/bare_loop.jsonl]

lattice's step: batches from the loader, recurrence `none` through the handle, loss, check, clipping, update,
metrics to jsonl and TensorBoard. The bare one: the same layers, loss and optimizer called one after the other
on one batch that is there already. In turn; prints the median of the paired ratios with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import lattice
from lattice import hardware
from lattice.assemble import training_graph
from lattice.decoder import AttentionMask
from lattice.rank_log import RankLog
from lattice.train import Loop
from lattice.watch import Watch

RECIPES = Path(__file__).parents[1] / "recipes"
CASES = {
    "pythia_70m, 2 x 256": (
        "pythia_70m.toml",
        ["run.batch_tokens=512", "run.sequence_tokens=256", "run.micro_batch=2", "precision.kind=fp32"],
    ),
    "quickstart's size, 8 x 128": ("quickstart.toml", ["recurrence.kind=none"]),
}
COMMON = [
    "data.kind=embedded",
    "tokenizer.kind=bytes",
    "activation_checkpoint.kind=none",
    "run.device=cpu",
]


def bare_step(loop: Loop, ids_BL: torch.Tensor, targets_BL: torch.Tensor) -> None:
    """A training step without the toolkit around the layers."""
    model, optimizer = loop.graph.model, loop.graph.optimizer
    decoder = model.decoder
    x_BL1D = decoder.embedding(ids_BL).unsqueeze(2)
    rotary = decoder.rotary(torch.arange(ids_BL.shape[1])[None], x_BL1D.dtype)
    mask = AttentionMask(causal=True)
    for block in decoder.blocks:
        x_BL1D = block(x_BL1D, rotary, mask, None)
    hidden_ND = decoder.final_norm(x_BL1D).flatten(0, 2)
    total, count = model.loss.total(hidden_ND, decoder.head, targets_BL.flatten())
    torch.autograd.backward(total / count)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(name: str, pairs: int) -> dict[str, Any]:
    file, overrides = CASES[name]
    recipe = lattice.load_recipe(RECIPES / file, [*COMMON, *overrides])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        graph = training_graph(recipe, Path(folder))
        log = stack.enter_context(RankLog(Path(folder), graph.world))
        watch = Watch(Path(folder), graph.world, recipe.run.timeout, log)
        loop = Loop(graph, {"step": 0, "seconds": 0.0}, watch)
        loop._open_logs(stack)
        batches = loop.graph.source.steps(0)
        (batch,) = next(loop.graph.source.steps(0))
        ratios, bare = [], []
        for number in range(pairs + 2):
            start = time.perf_counter()
            bare_step(loop, batch.ids_BL, batch.targets_BL)
            middle = time.perf_counter()
            loop._log(loop._step(number + 1, next(batches)))
            end = time.perf_counter()
            if number >= 2:
                bare.append(middle - start)
                ratios.append((end - middle) / bare[-1])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(f"{name}: {median:.3f} of the bare loop (quartiles {low:.3f} to {high:.3f}, {pairs} pairs)")
    return {
        "benchmark": "bare_loop",
        "case": name,
        "ratio_median": median,
        "ratio_quartiles": [low, high],
        "seconds_bare_median": statistics.median(bare),
        "pairs": pairs,
        "hardware": hardware.describe(torch.device("cpu")),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bare_loop.jsonl")
    arguments = parser.parse_args()
    rows = [measure(name, arguments.pairs) for name in CASES]
    with arguments.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
