"""What can be known to be wrong before anything large is allocated."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lattice.assemble import build_model, choose_device
from lattice.console import say
from lattice.hf import init_from
from lattice.memory import step_memory
from lattice.protocols import Backbone, Checkpoint, Data, Tokenizer
from lattice.recipe import Recipe, RecipeError


def check(recipe: Recipe, folder: Path | None = None) -> None:
    """Raises RecipeError with everything that keeps this recipe from training here, in the run's directory
    `folder` if given: a run that goes on needs no weights to start from."""
    tokenizer: Tokenizer = recipe.component("tokenizer")
    data: Data = recipe.component("data")
    shapes = _shapes(recipe)
    problems = [*shapes, *data.problems(tokenizer.spec), *([] if shapes else _memory(recipe))]
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


def _memory(recipe: Recipe) -> list[str]:
    device = choose_device(recipe.run.device)
    if device.type == "cuda":
        present, where = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    else:
        present, where = psutil.virtual_memory().available, "this machine"
    parts = _predicted(recipe, present)
    needed = sum(parts.values())
    if needed <= present:
        return []
    detail = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return [
        f"too little memory: needs at least {needed / 2**30:.1f} GiB ({detail}), {where} has "
        f"{present / 2**30:.1f} GiB free. Lower run.micro_batch or the backbone's sizes with --set, choose "
        "another activation_checkpoint.kind (lattice plan compares them), or use a larger machine"
    ]


def _predicted(recipe: Recipe, present: int) -> dict[str, int]:
    """Bytes by part: of weights, gradients and two moments if these are too much already, else of a step."""
    parameters = sum(p.numel() for p in build_model(recipe, device="meta").parameters())
    state = {"weights, gradients and optimizer state": 16 * parameters}
    if 16 * parameters > present:
        return state
    run = recipe.run
    try:
        memory = step_memory(recipe, rows=run.micro_batch or run.sequences, length=run.sequence_tokens)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        say(f"memory is not predicted: what the recurrence computes depends on values ({error})")
        return state
    return {part: size for part, size in asdict(memory).items() if size}
