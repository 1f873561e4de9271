"""lattice's side of benchmarks/against_reference.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from worker_protocol import NEW_TOKENS, serve

import lattice
from lattice.draws import Draw

RECIPES = Path(__file__).parents[1] / "recipes"


def build() -> Callable[[], object]:
    mode, *arguments = sys.argv[1:]
    return (training if mode == "train" else decoding)(*arguments)


def training(thoughts: str, precision: str, batch: str, length: str, *overrides: str) -> Callable[[], object]:
    """A step of Pythia-70m's shape."""
    recipe = lattice.load_recipe(
        RECIPES / "pythia_70m_lt.toml",
        [
            "activation_checkpoint.kind=none",
            f"recurrence.thoughts={thoughts}",
            "recurrence.jacobi.train=[3, 3]",
            f"precision.kind={precision}",
            *overrides,
        ],
    )
    model = lattice.build_model(recipe).train()
    optimizer = recipe.component("optimizer").build(model)
    autocast = recipe.component("precision").autocast
    ids_BL = torch.randint(50_000, (int(batch), int(length)), generator=torch.Generator().manual_seed(0))
    targets_BL = torch.nn.functional.pad(ids_BL[:, 1:], (0, 1), value=-100)

    def step() -> None:
        with autocast(ids_BL.device):
            loss = model(ids_BL, targets=targets_BL, draw=Draw(0, 0)).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(thoughts: str, precision: str, batch: str, length: str, *overrides: str) -> Callable[[], object]:
    """Greedy decoding after a prompt: thoughts of the prompt by the solver, those after it in sequence."""
    overrides = (f"recurrence.thoughts={thoughts}", *overrides)
    recipe = lattice.load_recipe(RECIPES / "llama_125m_lt.toml", overrides)
    model = lattice.build_model(recipe).eval()
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    ids_BL = torch.randint(50_000, (int(batch), int(length)), generator=torch.Generator().manual_seed(0))
    # The reference finds the prompt's thoughts by its solver too, all tokens at once.
    return lambda: lattice.generate(model, ids_BL, NEW_TOKENS, parallel_prefill=True)


if __name__ == "__main__":
    serve(build)
