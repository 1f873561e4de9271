"""What a recipe would need and take on GPUs that one does not have.

Memory is predicted by computing a step on fake tensors (lattice.memory), time from the ledger's operations at
a stated share of the GPUs' peak. Over several GPUs the recipe's [parallel] divides the memory; where weights
are sharded a rank holds all of them and their gradients throughout a step, gathered once, if these fit. What
it sends for that is counted beside (lattice.communication) and taken to be hidden behind what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lattice.arrangement import RESERVE, Arrangement, arranged, rank_memory
from lattice.communication import Traffic, traffic
from lattice.hardware import GPU
from lattice.ledger import Ledger, ledger
from lattice.memory import StepMemory, step_memory
from lattice.recipe import Recipe, load_recipe
from lattice.thought_counts import own_thoughts, with_thoughts

USUAL = (0, 1, 2, 3)
"""Numbers of thoughts that are planned if none are asked for."""

CHECKPOINTING: dict[str, dict[str, object]] = {
    "none": {"kind": "none"},
    "selective": {"kind": "selective"},
    "block": {"kind": "block"},
    "pass": {"kind": "pass"},
    "pass, blocks": {"kind": "pass", "blocks": True},
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where it is to run."""

    gpu: GPU
    gpus: int = 1
    utilization: float = 0.4
    """Share of the peak that is reached, of all operations that are done, repeated ones too."""
    reserve: float = RESERVE

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus = {self.gpus}: must be at least 1")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"mfu = {self.utilization}: must be greater than 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One number of thoughts and one kind of activation checkpointing, on the target."""

    thoughts: int
    checkpointing: str
    micro_batch: int
    """Sequences of a rank at once: the recipe's if so many fit, else a divisor of them that does."""
    memory: StepMemory
    """Of a rank."""
    gathered: bool
    """Whether that includes all weights and gradients throughout a step."""
    costs: Ledger
    fits: bool
    tokens_per_second: float
    """On all GPUs."""
    days: float
    """For the recipe's tokens."""
    gpu_hours: float
    communication: list[Traffic]
    """Of a rank in a step; nothing for one GPU."""


def thinking_recipes(recipe: Recipe, thoughts: Sequence[int] | None) -> dict[int, Recipe]:
    """The recipe with each of these numbers of thoughts. Of None: with those of the usual ones that its
    recurrence can have, and as it is, with what its training draws. Raises ValueError for a number that it
    cannot have."""
    if thoughts is not None:
        return {count: with_thoughts(recipe, count) for count in thoughts}
    found = {}
    for count in USUAL:
        with suppress(ValueError):
            found[count] = with_thoughts(recipe, count)
    found[own_thoughts(recipe)] = recipe
    return dict(sorted(found.items()))


def plan(recipe: Recipe, thoughts: Sequence[int] | None, target: Target) -> Iterator[Setting]:
    """Every thought count with every kind of checkpointing. Raises ValueError as `thinking_recipes` does,
    RecipeError for a batch or model that so many GPUs cannot divide, and NotPredicted."""
    ranks = arranged(recipe, target.gpus)
    for count, thinking in thinking_recipes(recipe, thoughts).items():
        for name, table in CHECKPOINTING.items():
            chosen = load_recipe({**thinking.table(), "activation_checkpoint": table})
            yield _setting(count, name, chosen, target, ranks)


def cheapest(settings: Sequence[Setting]) -> Setting | None:
    """Of those that fit the one that takes the least time, and among equals the one with the most room."""
    fitting = [setting for setting in settings if setting.fits]
    return min(fitting, key=lambda one: (one.gpu_hours, one.memory.total), default=None)


def _setting(count: int, name: str, recipe: Recipe, target: Target, ranks: Arrangement) -> Setting:
    run = recipe.run
    room = (1 - target.reserve) * target.gpu.memory
    ranks, alone = _fitting(recipe, target.gpus, ranks, room)
    memory, gathered = rank_memory(recipe, alone, target.gpus, room)
    costs = ledger(recipe)
    operations = costs.training_operations + costs.repeated_operations
    rate = target.gpus * target.gpu.peak * target.utilization / operations
    seconds = run.steps * run.batch_tokens / rate
    communication = traffic(
        recipe,
        costs,
        target.gpu,
        target.gpus,
        micro_batches=ranks.micro_batches,
        compute_seconds=seconds / run.steps,
    )
    return Setting(
        thoughts=count,
        checkpointing=name,
        micro_batch=ranks.rows,
        memory=memory,
        costs=costs,
        gathered=gathered,
        fits=memory.total <= room,
        tokens_per_second=rate,
        days=seconds / 86400,
        gpu_hours=target.gpus * seconds / 3600,
        communication=communication if target.gpus > 1 else [],
    )


def _fitting(recipe: Recipe, size: int, ranks: Arrangement, room: float) -> tuple[Arrangement, StepMemory]:
    """The same batch in smaller parts, as large as fit into `room` on each of `size` ranks, and the memory of
    a step in one process; in the parts it has where none of these fit.

    Between one sequence and all of them memory is taken to grow evenly. A step needs the most that any moment
    of it does, and each of these grows evenly, but for the loss of fewer tokens than a chunk has: so this is
    at most some logits too little."""

    def predicted(rows: int, micro_batches: int) -> StepMemory:
        length = recipe.run.sequence_tokens
        return step_memory(recipe, rows=rows, length=length, micro_batches=micro_batches, gpu=True)

    def fits(alone: StepMemory) -> bool:
        return rank_memory(recipe, alone, size, room)[0].total <= room

    whole = predicted(ranks.rows, ranks.micro_batches)
    if ranks.rows == 1 or fits(whole):
        return ranks, whole
    # In smaller parts there are several, and gradients throughout.
    rows, alone = 1, predicted(1, 2)
    if not fits(alone):
        return ranks, whole
    least, most = alone, whole if ranks.micro_batches > 1 else predicted(ranks.rows, 2)
    for more in (more for more in range(2, ranks.rows) if ranks.rows % more == 0):
        between = least.towards(most, (more - 1) / (ranks.rows - 1))
        if fits(between):
            rows, alone = more, between
    return Arrangement(rows, ranks.rows // rows * ranks.micro_batches), alone
