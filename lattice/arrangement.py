"""How a recipe's batch and model are divided among ranks, known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.memory import StepMemory
from lattice.protocols import Backbone, Parallel
from lattice.recipe import Recipe, RecipeError

RESERVE = 0.06
"""Share of a GPU's memory that the driver, the libraries and fragments take."""


@dataclass(frozen=True)
class Arrangement:
    """What each rank does of a step."""

    rows: int
    """Sequences that a rank takes at once."""
    micro_batches: int
    """How often it does, in a step."""


def together(recipe: Recipe, size: int) -> int:
    """How many neighbouring ranks of `size` work on the same sequences. Raises RecipeError where the recipe's
    [parallel] cannot arrange so many."""
    parallel: Parallel = recipe.component("parallel")
    try:
        return parallel.together(size)
    except ValueError as error:
        raise RecipeError([_of_option(recipe, str(error))]) from error


def arranged(recipe: Recipe, size: int) -> Arrangement:
    """Over `size` ranks. Raises RecipeError with all that cannot be divided."""
    backbone: Backbone = recipe.component("backbone")
    parallel: Parallel = recipe.component("parallel")
    run, shares = recipe.run, size // together(recipe, size)
    problems = [
        _of_option(recipe, problem)
        for problem in parallel.problems(backbone.shape, run.sequence_tokens, size)
    ]
    share, left = divmod(run.sequences, shares)
    rows = run.micro_batch or share
    if left:
        problems.append(
            f"{recipe.origin(('run', 'batch_tokens'))}: run.batch_tokens = {run.batch_tokens}: its "
            f"{run.sequences} sequences must divide by {shares} GPUs"
        )
    elif share % rows:
        problems.append(
            f"{recipe.origin(('run', 'micro_batch'))}: run.micro_batch = {rows}: must divide the "
            f"{share} sequences of each of {shares} GPUs"
        )
    if problems:
        raise RecipeError(problems)
    return Arrangement(rows, share // rows)


def rank_memory(recipe: Recipe, alone: StepMemory, size: int, room: float) -> tuple[StepMemory, bool]:
    """Memory of a rank in a step that takes `alone` in one process, and whether all weights and gradients
    are there throughout: they are if that fits into `room` bytes."""
    parallel: Parallel = recipe.component("parallel")
    gathered = parallel.memory(alone, size, gathered=True)
    if gathered.total <= room:
        return gathered, True
    return parallel.memory(alone, size, gathered=False), False


def _of_option(recipe: Recipe, problem: str) -> str:
    """A component's complaint, which begins with its option's name, with the place of that option."""
    option = problem.split(" ", 1)[0]
    return f"{recipe.origin(('parallel', option))}: parallel.{problem}"
