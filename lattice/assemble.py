"""The only wiring: a recipe becomes a training graph or an evaluation subject.

The order is fixed: backbone, recurrence, precision, compile, parallel, weights, optimizer. Nothing large is
allocated before the recipe has been checked as a whole (lattice.preflight).
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lattice.build import draw_weights, weightless_model
from lattice.codec import open_codec
from lattice.hardware import choose_device
from lattice.hf.init_from import initialize
from lattice.model import LanguageModel
from lattice.protocols import (
    Checkpoint,
    Checkpointer,
    Codec,
    Compile,
    Data,
    DataRequest,
    EvaluationSubject,
    Evaluator,
    Metrics,
    Optimizer,
    Parallel,
    Precision,
    Schedule,
    Source,
)
from lattice.recipe import Recipe
from lattice.run_folder import CHECKPOINTS
from lattice.spread import Site, Spread
from lattice.world import World


@dataclass
class TrainingGraph:
    """Everything a training loop touches."""

    recipe: Recipe
    folder: Path
    world: World
    device: torch.device
    model: LanguageModel
    spread: Spread
    precision: Precision
    optimizer: torch.optim.Optimizer
    built_groups: list[dict[str, Any]]
    """The optimizer's parameter groups as they were built, but for the parameters."""
    peak_lr: float
    grad_clip: float | None
    schedule: Schedule
    codec: Codec
    source: Source
    micro_batch: tuple[int, int]
    """Its sequences and their tokens."""
    checkpointer: Checkpointer
    checkpoint_every: int
    metrics: dict[str, Metrics]
    evaluators: dict[str, Evaluator]

    def autocast(self) -> AbstractContextManager[Any]:
        return self.precision.autocast(self.device)

    def subject(self, step: int) -> EvaluationSubject:
        """What evaluators use after `step` steps."""
        source = self.source
        return EvaluationSubject(
            self.model, self.codec, lambda: source, self.autocast, self.device, step, self.world
        )


def training_graph(
    recipe: Recipe,
    folder: Path,
    *,
    checkpointer: Checkpointer | None = None,
    world: World | None = None,
    device: torch.device | None = None,
    gathered_fits: bool | None = None,
) -> TrainingGraph:
    """Builds all that training needs; the run's files lie in `folder`. All ranks of `world` call it;
    `gathered_fits` as in lattice.spread.Site."""
    world = world or World()
    device = device or choose_device(recipe.run.device)
    parallel: Parallel = recipe.component("parallel")
    precision: Precision = recipe.component("precision")
    optimizer: Optimizer = recipe.component("optimizer")
    checkpoint: Checkpoint = recipe.component("checkpoint")
    data: Data = recipe.component("data")
    codec = world.in_turn(lambda: open_codec(recipe, folder / "tokenizer"))
    request = _request(recipe, codec, world)
    source = world.in_turn(lambda: data.open(request))
    world.agree("the data", json.dumps(source.fingerprints, sort_keys=True))
    checkpointer = checkpointer or checkpoint.build(folder / CHECKPOINTS)
    site = Site(world=world, device=device, weights=precision.weights, gathered_fits=gathered_fits)
    model = weightless_model(recipe)
    precision.apply(model)
    compile_: Compile = recipe.component("compile")
    compile_.apply(model)
    parallel.shard(model, site)
    draw_weights(model, recipe, device)
    model.to(device)
    if recipe.run.init_from is not None and checkpointer.latest() is None:
        initialize(model, recipe)
    spread, built = parallel.spread(model, site), optimizer.build(model)
    return TrainingGraph(
        recipe=recipe,
        folder=folder,
        world=world,
        device=device,
        model=model,
        spread=spread,
        precision=precision,
        optimizer=built,
        built_groups=groups_of(built),
        peak_lr=optimizer.lr,
        grad_clip=optimizer.grad_clip or None,
        schedule=recipe.component("schedule"),
        codec=codec,
        source=source,
        micro_batch=(request.micro_batch, request.sequence_tokens),
        checkpointer=checkpointer,
        checkpoint_every=checkpoint.every,
        metrics=recipe.named("metrics"),
        evaluators=recipe.named("evaluator"),
    )


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What its parameter groups hold, but for the parameters."""
    return [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]


def evaluation_graph(
    recipe: Recipe, codec: Codec, model: LanguageModel, step: int, *, device: str = "auto"
) -> EvaluationSubject:
    """A trained model with what its evaluators use; nothing that only training needs is built. It computes in
    the number format it was trained in, float8 as the bfloat16 around it."""
    on = choose_device(device, "device")
    precision: Precision = recipe.component("precision")
    data: Data = recipe.component("data")
    return EvaluationSubject(
        model.to(on).eval(),
        codec,
        lambda: data.open(_request(recipe, codec, World())),
        lambda: precision.autocast(on),
        on,
        step,
    )


def _request(recipe: Recipe, codec: Codec, world: World) -> DataRequest:
    run = recipe.run
    return DataRequest(
        codec=codec,
        cache=cache_folder(),
        sequence_tokens=run.sequence_tokens,
        micro_batch=run.micro_batch or run.sequences // world.data_size,
        batch=run.sequences,
        documents=recipe.component("mask").needs_documents,
        seed=run.seed,
        rank=world.data_rank,
        world_size=world.data_size,
    )


def cache_folder() -> Path:
    """Where prepared copies of the embedded text are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lattice"
