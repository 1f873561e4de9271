"""How fast linears multiply in float32 on this CPU: torch's, and lattice's (lattice/linear.py).

    python benchmarks/linears.py [--threads 2] [--rows 1 64 1024]

GFLOP/s, forward and with both gradients, medians of repetitions in turn; and how many times faster lattice's
are, the median of the ratios of neighbouring ones and its quartiles. Where both are torch's, the ratio is 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lattice import hardware, onednn
from lattice.console import table
from lattice.linear import Linear

SHAPES = {
    "into the MLP": (512, 2048),
    "out of it": (2048, 512),
    "attention": (512, 512),
    "head": (512, 50304),
}
"""Of Pythia-70m, inputs and outputs."""


def seconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def in_turn(calls: list[Callable[[], object]], repetitions: int) -> tuple[float, float, str]:
    """Seconds of the first and of the second, and how many times faster that is."""
    for call in calls:
        call()
    times = max(1, int(0.02 / seconds(calls[0], 1)))
    pairs = [[seconds(call, times) for call in calls] for _ in range(repetitions)]
    low, middle, high = statistics.quantiles((one / other for one, other in pairs), n=4, method="inclusive")
    first, second = (statistics.median(one) for one in zip(*pairs, strict=True))
    return first, second, f"{middle:.2f} ({low:.2f} to {high:.2f})"


def measured(inputs: int, outputs: int, rows: int, repetitions: int) -> list[str]:
    own = Linear(inputs, outputs)
    x_ND = torch.randn(rows, inputs, requires_grad=True)
    grad_NO = torch.randn(rows, outputs)

    def forward(kind: type[nn.Linear]) -> Callable[[], object]:
        return torch.no_grad()(lambda: kind.forward(own, x_ND))

    def learnt(kind: type[nn.Linear]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(kind.forward(own, x_ND), [x_ND, own.weight], grad_NO)

    cells = []
    for of, products in ((forward, 1), (learnt, 3)):
        torchs, ours, faster = in_turn([of(nn.Linear), of(Linear)], repetitions)
        operations = products * 2 * rows * inputs * outputs / 1e9
        cells += [f"{operations / torchs:.0f}", f"{operations / ours:.0f}", faster]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512, 1024])
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        [name, str(count), *measured(inputs, outputs, count, options.repetitions)]
        for name, (inputs, outputs) in SHAPES.items()
        for count in options.rows
    ]
    columns = ["linear", "rows", "torch", "lattice", "faster", "torch, learnt", "lattice, learnt", "faster"]
    by = "oneDNN" if onednn.faster() else "what torch takes"
    title = f"GFLOP/s, {hardware.describe(torch.device('cpu'))}, torch {torch.__version__}, by {by}"
    table(title, columns, rows)


if __name__ == "__main__":
    main()
