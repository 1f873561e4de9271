"""What does the residual telemetry cost? A training step with it and without it, interleaved.

    python benchmarks/telemetry.py [--pairs 20] [--out benchmarks/results/telemetry.jsonl]

Prints the median of the paired ratios with its spread, and appends a line with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from unittest import mock

import torch

import lattice
from lattice.components.recurrence._convergence import Convergence

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def seconds_of_a_step(model: lattice.LanguageModel, ids_BL: torch.Tensor) -> float:
    start = time.perf_counter()
    loss = model(ids_BL, targets=ids_BL).loss
    assert loss is not None
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "telemetry.jsonl")
    arguments = parser.parse_args()

    model = lattice.build_model(RECIPE)
    ids_BL = torch.randint(0, model.shape.vocab_size, (16, 128))
    without = mock.patch.object(Convergence, "watch", return_value=False)
    seconds_of_a_step(model, ids_BL)  # warm-up
    ratios, plain = [], []
    for _ in range(arguments.pairs):
        with without:
            plain.append(seconds_of_a_step(model, ids_BL))
        ratios.append(seconds_of_a_step(model, ids_BL) / plain[-1])
    low, median, high = statistics.quantiles(ratios, n=4)
    result = {
        "benchmark": "telemetry",
        "ratio_median": median,
        "ratio_quartiles": [low, high],
        "seconds_without_median": statistics.median(plain),
        "pairs": arguments.pairs,
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    print(
        f"with / without telemetry: {median:.3f} (quartiles {low:.3f} to {high:.3f}, {arguments.pairs} pairs)"
    )
    arguments.out.parent.mkdir(exist_ok=True)
    with arguments.out.open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
