"""What bounds decoding: how fast this machine reads, how fast linears read for one row, what a step adds.

    python benchmarks/decode_limit.py [--thoughts 1]

One row, the shape of recipes/llama_125m_lt.toml, one thread, whose own time is taken, least of many: what
others do on the machine shows little in it. A token reads all weights of the layers for each slot and the
head once, so that no step can be faster than its linears alone. Those are shown twice: as torch has them, and
as decoding does (lattice.one_row).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lattice
from lattice.console import table

RECIPE = Path(__file__).parents[1] / "recipes" / "llama_125m_lt.toml"
PROMPT = 32


def least(call: Callable[[], object], repetitions: int) -> float:
    """Seconds of this thread."""
    seconds = []
    for _ in range(repetitions):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def linears_of(model: lattice.LanguageModel, slots: int) -> list[tuple[nn.Linear, Tensor]]:
    """Those that a token goes through, each with an input."""
    layers = [module for module in model.decoder.blocks.modules() if isinstance(module, nn.Linear)]
    chosen = [*layers * slots, model.decoder.head]
    return [(linear, linear.weight.new_zeros(1, 1, linear.in_features)) for linear in chosen]


@torch.no_grad()
def measured(dtype: torch.dtype, thoughts: int, repetitions: int) -> list[str]:
    recipe = lattice.load_recipe(RECIPE, [f"recurrence.thoughts={thoughts}"])
    model = lattice.build_model(recipe).eval().to(dtype)
    linears = linears_of(model, thoughts + 1)
    size = sum(linear.weight.nbytes for linear, _ in linears)

    def alone(forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        for linear, x_B1D in linears:
            forward(linear, x_B1D)

    many = least(lambda: alone(nn.Linear.forward), repetitions)
    one = least(lambda: alone(nn.Linear.__call__), repetitions)
    _, cache = model.prefill(torch.zeros(1, PROMPT, dtype=torch.int64), parallel=True)
    token_B1 = torch.zeros(1, 1, dtype=torch.int64)
    step = least(lambda: model.step(token_B1, cache), repetitions)
    figures = (step * 1e3, one * 1e3, size / 1e9, size / many / 1e9, size / one / 1e9)
    return [str(dtype).removeprefix("torch."), *(f"{figure:.3g}" for figure in figures)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thoughts", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    read = torch.ones(2**25)
    bandwidth = read.nbytes / least(read.sum, options.repetitions) / 1e9
    dtypes = (torch.float32, torch.bfloat16)
    rows = [measured(dtype, options.thoughts, options.repetitions) for dtype in dtypes]
    columns = ["precision", "step, ms", "its linears, ms", "weights read, GB", "GB/s", "as decoded"]
    table(f"a token, K = {options.thoughts}; a sum over 134 MB reads {bandwidth:.1f} GB/s", columns, rows)


if __name__ == "__main__":
    main()
