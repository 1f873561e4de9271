"""The only wiring: a recipe becomes a model, a training graph or an evaluation subject.

The order is fixed: backbone, recurrence, precision, compile, parallel, weights, optimizer. Nothing large is
allocated before the recipe has been checked as a whole (lattice.preflight).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lattice.draws import Draw
from lattice.model import LanguageModel
from lattice.protocols import (
    Backbone,
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
    Recurrence,
    Schedule,
    Source,
    Tokenizer,
)
from lattice.recipe import Recipe, RecipeError, load_recipe
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
    peak_lr: float
    grad_clip: float | None
    schedule: Schedule
    codec: Codec
    source: Source
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


def build_model(recipe: str | Path | Mapping[str, Any] | Recipe, *, device: str = "cpu") -> LanguageModel:
    """A model with newly drawn weights; `[backbone]` and `[recurrence]` are all the recipe needs.

    The weights depend on `run.seed` alone. `device = "meta"` allocates nothing. Raises RecipeError.
    """
    recipe = load_recipe(recipe)
    model = weightless_model(recipe)
    if device == "meta":
        return model.to(device)
    draw_weights(model, recipe, torch.device("cpu"))
    return model.to(device)


def weightless_model(recipe: Recipe) -> LanguageModel:
    """Its decoder is on the meta device, where it can be divided among ranks before it has weights. What a
    recurrence has of its own is small: it is drawn by what builds it."""
    with torch.device("meta"):
        model = undrawn_model(recipe)
    if isinstance(model.unroll, torch.nn.Module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Draw(recipe.run.seed, 0).integer("recurrence", 0, 2**62))
            model.unroll = model.recurrence.build(model.shape)
    return model


def draw_weights(model: LanguageModel, recipe: Recipe, device: torch.device) -> None:
    """Gives a weightless model its weights on `device`; where it is divided among ranks, each its share.

    They are drawn on the CPU, one after the other, so that a seed means the same weights on every device and
    on any number of ranks, and no rank ever holds more than one whole."""
    model.decoder.allocate(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model.decoder.initialize(model.recurrence.initialization(model.shape))


def undrawn_model(recipe: Recipe) -> LanguageModel:
    """The modules, on the current default device, their weights not drawn. Raises RecipeError."""
    roles = ("backbone", "recurrence", "mask", "loss", "activation_checkpoint")
    try:
        return LanguageModel(*(recipe.component(role) for role in roles))
    except ValueError as error:  # an option that this backbone's shape does not allow; its name comes first
        option = str(error).split(" ", 1)[0]
        if not hasattr(recipe.component("recurrence"), option):
            raise
        raise RecipeError([f"{recipe.origin(('recurrence', option))}: recurrence.{error}"]) from error


def open_codec(recipe: Recipe, folder: Path | None) -> Codec:
    """The recipe's tokenizer, from `folder` where an earlier run saved it."""
    data: Data = recipe.component("data")
    tokenizer: Tokenizer = recipe.component("tokenizer")
    return _fitting(recipe, tokenizer.build(folder, data.corpus()))


def saved_codec(recipe: Recipe, run: Path) -> Codec:
    """The tokenizer that a run was trained with. Raises FileNotFoundError where it is gone: one that was
    trained anew might be another."""
    tokenizer: Tokenizer = recipe.component("tokenizer")
    folder = run / "tokenizer"
    if folder.is_dir():
        return _fitting(recipe, tokenizer.build(folder))
    try:
        return _fitting(recipe, tokenizer.build(None))
    except (ValueError, OSError) as error:
        raise FileNotFoundError(
            f"'{run}' has no tokenizer: restore its directory 'tokenizer', from `lattice run`: {error}"
        ) from error


def _fitting(recipe: Recipe, codec: Codec) -> Codec:
    """Raises RecipeError for a tokenizer that the model's table has no room for."""
    backbone: Backbone = recipe.component("backbone")
    vocabulary = backbone.shape.vocab_size
    if codec.vocab_size > vocabulary:
        raise RecipeError(
            [
                f"backbone.vocab_size = {vocabulary}: the tokenizer has {codec.vocab_size} tokens; "
                f"must be at least that"
            ]
        )
    _check_reserved(recipe, codec.vocab_size)
    return codec


def _check_reserved(recipe: Recipe, tokens: int) -> None:
    """A row of the table that the recurrence uses must not be a token's."""
    backbone: Backbone = recipe.component("backbone")
    recurrence: Recurrence = recipe.component("recurrence")
    taken = [row for row in recurrence.reserved_ids(backbone.shape) if row < tokens]
    if taken:
        kind = getattr(recurrence, "kind", type(recurrence).__name__)
        raise RecipeError(
            [
                f"recurrence '{kind}' uses row {taken[0]} of the embedding table, which is a token of the "
                f"tokenizer's {tokens}: raise backbone.vocab_size to {tokens + 1} at least, and name a row "
                "from there on if the recipe names one"
            ]
        )


def choose_device(name: str, option: str = "run.device", *, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU where there is one; of several ranks on a host, each takes its own. Raises ValueError,
    naming the option, for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} = '{name}': not available here: {reason}") from error
    return device


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
    source = world.in_turn(lambda: data.open(_request(recipe, codec, world)))
    checkpointer = checkpointer or checkpoint.build(folder / "checkpoints")
    site = Site(world=world, device=device, weights=precision.weights, gathered_fits=gathered_fits)
    model = weightless_model(recipe)
    precision.apply(model)
    compile_: Compile = recipe.component("compile")
    compile_.apply(model)
    parallel.shard(model, site)
    draw_weights(model, recipe, device)
    model.to(device)
    if recipe.run.init_from is not None and checkpointer.latest() is None:
        from lattice.hf.init_from import initialize

        initialize(model, recipe)
    return TrainingGraph(
        recipe=recipe,
        folder=folder,
        world=world,
        device=device,
        model=model,
        spread=parallel.spread(model, site),
        precision=precision,
        optimizer=optimizer.build(model),
        peak_lr=optimizer.lr,
        grad_clip=optimizer.grad_clip,
        schedule=recipe.component("schedule"),
        codec=codec,
        source=source,
        checkpointer=checkpointer,
        checkpoint_every=checkpoint.every,
        metrics=recipe.named("metrics"),
        evaluators=recipe.named("evaluator"),
    )


def evaluation_graph(
    recipe: Recipe, folder: Path, model: LanguageModel, step: int, *, device: str = "auto"
) -> EvaluationSubject:
    """A trained model with what its evaluators use; nothing that only training needs is built. It computes in
    the number format it was trained in, float8 as the bfloat16 around it."""
    on = choose_device(device, "device")
    precision: Precision = recipe.component("precision")
    data: Data = recipe.component("data")
    codec = saved_codec(recipe, folder)
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
