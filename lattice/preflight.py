"""What can be known to be wrong before anything large is allocated."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from lattice.assemble import build_model, choose_device
from lattice.hf import init_from
from lattice.protocols import Backbone, Checkpoint, Data, Recurrence, Tokenizer
from lattice.recipe import Recipe, RecipeError


def check(recipe: Recipe, folder: Path | None = None) -> None:
    """Raises RecipeError with everything that keeps this recipe from training here, in the run's directory
    `folder` if given: a run that goes on needs no weights to start from."""
    tokenizer: Tokenizer = recipe.component("tokenizer")
    data: Data = recipe.component("data")
    problems = [*_shapes(recipe), *data.problems(tokenizer.spec), *_memory(recipe)]
    if not _goes_on(recipe, folder):
        problems += init_from.problems(recipe)
    if problems:
        raise RecipeError(problems)


def _goes_on(recipe: Recipe, folder: Path | None) -> bool:
    checkpoint: Checkpoint = recipe.component("checkpoint")
    return folder is not None and checkpoint.build(folder / "checkpoints").latest() is not None


def _shapes(recipe: Recipe) -> list[str]:
    backbone: Backbone = recipe.component("backbone")
    length, context = recipe.run.sequence_tokens, backbone.shape.context
    if length <= context:
        return []
    place = recipe.origin(("run", "sequence_tokens"))
    return [
        f"{place}: run.sequence_tokens = {length}: must be at most "
        f"backbone.max_position_embeddings = {context}"
    ]


def least_memory(recipe: Recipe) -> dict[str, int]:
    """Bytes that training needs whatever is recomputed, by part: a lower bound.

    Weights, gradients and two moments in float32, and in the largest pass one float32 hidden state for each
    slot and layer.
    """
    backbone: Backbone = recipe.component("backbone")
    recurrence: Recurrence = recipe.component("recurrence")
    run, shape = recipe.run, backbone.shape
    parameters = sum(p.numel() for p in build_model(recipe, device="meta").parameters())
    slots = (run.micro_batch or run.sequences) * run.sequence_tokens * recurrence.slots
    return {
        "weights, gradients and optimizer state": 16 * parameters,
        "activations": 4 * slots * shape.num_layers * shape.hidden_size,
    }


def _memory(recipe: Recipe) -> list[str]:
    device = choose_device(recipe.run.device)
    if device.type == "cuda":
        present, where = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    else:
        present, where = psutil.virtual_memory().available, "this machine"
    parts = least_memory(recipe)
    needed = sum(parts.values())
    if needed <= present:
        return []
    detail = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return [
        f"too little memory: needs at least {needed / 2**30:.1f} GiB ({detail}), {where} has "
        f"{present / 2**30:.1f} GiB free. Lower run.micro_batch or the backbone's sizes with --set, or use a "
        "larger machine"
    ]
