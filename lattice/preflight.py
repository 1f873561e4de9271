"""What can be known to be wrong before anything large is allocated."""

from __future__ import annotations

from dataclasses import asdict

import psutil
import torch

from lattice.arrangement import RESERVE, arranged, rank_memory
from lattice.build import build_model
from lattice.console import say
from lattice.hardware import choose_device
from lattice.hf import init_from
from lattice.memory import NotPredicted, StepMemory, step_memory
from lattice.protocols import Backbone, Data, EvaluationSubject, Evaluator, Parallel, Tokenizer
from lattice.recipe import Recipe, RecipeError
from lattice.world import World


def check(
    recipe: Recipe,
    *,
    fresh: bool = True,
    world: World | None = None,
    device: torch.device | None = None,
) -> bool | None:
    """Raises RecipeError with everything that keeps this recipe from training here, on the ranks of `world`.
    A run that is not `fresh`, but goes on, needs no weights to start from.

    Returns whether a step fits in memory with all weights and gradients there throughout; None if unknown.
    """
    world = world or World()
    tokenizer: Tokenizer = recipe.component("tokenizer")
    data: Data = recipe.component("data")
    problems = [*_shapes(recipe), *_names(recipe), *_division(recipe, world)]
    gathered_fits = None
    if not problems:
        problems, gathered_fits = _memory(recipe, world, device or choose_device(recipe.run.device))
    problems += data.problems(tokenizer.spec)
    if fresh:
        problems += init_from.problems(recipe)
    if problems:
        raise RecipeError(problems)
    return gathered_fits


def check_evaluators(recipe: Recipe, subject: EvaluationSubject) -> None:
    """Raises RecipeError with everything that would keep the recipe's evaluators from their work, before that
    is asked of them."""
    problems = []
    evaluators: dict[str, Evaluator] = recipe.named("evaluator")
    for name, one in evaluators.items():
        try:
            one.check(subject)
        except (ValueError, OSError, ImportError) as error:
            problems.append(f"{recipe.origin(('evaluators', name))}: [evaluators.{name}]: {error}")
    if problems:
        raise RecipeError(problems)


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


def _names(recipe: Recipe) -> list[str]:
    """Evaluators whose loss would be taken for the training's."""
    return [
        f"{recipe.origin(('evaluators', name))}: [evaluators.{name}]: '{name}_loss' is the training's in "
        "summary.json; choose another name"
        for name in recipe.named("evaluator")
        if name in ("first", "last")
    ]


def _division(recipe: Recipe, world: World) -> list[str]:
    """What cannot be divided among the ranks."""
    try:
        arranged(recipe, world.size)
    except RecipeError as error:
        return error.problems
    return []


def _memory(recipe: Recipe, world: World, device: torch.device) -> tuple[list[str], bool | None]:
    """What is wrong, and whether all weights and gradients fit throughout a step with a GPU's reserve left,
    as `lattice plan` has it. Wrong is only what needs more than there is."""
    if device.type == "cuda":
        present, of_card = torch.cuda.mem_get_info(device)
        room, where = min(present, (1 - RESERVE) * of_card), torch.cuda.get_device_name(device)
    else:
        room = present = psutil.virtual_memory().available // world.launch.local_size
        where = "this machine"
        where += f", for each of {world.launch.local_size} ranks," if world.launch.local_size > 1 else ""
    alone, complete = _predicted(recipe, world, present, gpu=device.type == "cuda")
    memory, gathered = rank_memory(recipe, alone, world.size, room)
    if memory.total <= present:
        return [], gathered if complete else None
    parts = {name: size for name, size in asdict(memory).items() if size}
    detail = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return [
        f"too little memory: needs at least {memory.total / 2**30:.1f} GiB ({detail}), {where} has "
        f"{present / 2**30:.1f} GiB free. Lower run.micro_batch or the backbone's sizes with --set, choose "
        "another activation_checkpoint.kind (lattice plan compares them), or use a larger machine"
    ], None


def _predicted(recipe: Recipe, world: World, present: int, *, gpu: bool) -> tuple[StepMemory, bool]:
    """Of a process alone, and whether that is all: of weights, gradients and two moments only, if a rank's
    share of these is too much already or a step cannot be predicted."""
    parallel: Parallel = recipe.component("parallel")
    size = 4 * sum(p.numel() for p in build_model(recipe, device="meta").parameters())
    state = StepMemory(parameters=size, gradients=size, optimizer=2 * size, logits=0, activations=0)
    if parallel.memory(state, world.size, gathered=False).total > present:
        return state, False
    try:
        ranks, length = arranged(recipe, world.size), recipe.run.sequence_tokens
        alone = step_memory(
            recipe, rows=ranks.rows, length=length, micro_batches=ranks.micro_batches, gpu=gpu
        )
        return alone, True
    except NotPredicted as error:
        say(str(error))
        return state, False
