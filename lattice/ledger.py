"""The ledger: what a recipe costs, added up from what its components declare (lattice.cost).

Operations are the model's; what activation checkpointing computes again is counted apart.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lattice.build import build_model
from lattice.cost import Pass
from lattice.protocols import ActivationCheckpoint, Backbone, Recurrence
from lattice.recipe import Recipe

BACKWARD = 2
"""Operations of the backward pass for each of the forward pass."""
SAMPLED = 4096
"""Steps of a training that are looked at, at most, where they differ in cost."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Costs of one recipe at one sequence length; all but the parameters are for one token."""

    length: int
    """Tokens of a sequence."""
    parameters: int
    layer_parameters: int
    """Of the layers and the final norm alone: without embedding and head."""
    training_token_passes: float
    """Slots sent through all layers, in the mean over the steps and their draws."""
    evaluation_token_passes: float
    """The same with the counts of evaluation."""
    inference_token_passes: float
    """The same in sequential decoding, which is the definition."""
    training_operations: float
    """Forward and backward, head included, in the mean over the steps and their draws."""
    repeated_operations: float
    """What activation checkpointing computes again in the backward pass, at most: a last product whose result
    nothing needs is counted, which in models of few layers is some of it."""
    evaluation_operations: float
    """Forward, in parallel, with the counts of evaluation."""
    inference_operations: float
    """Decoding one token in sequence after `length` others."""
    cached_numbers: float
    """Numbers that a decoded token leaves in the cache."""

    def cache_bytes(self, bytes_each: int = 2) -> float:
        """Of the cache for each token, bfloat16 if nothing is said."""
        return self.cached_numbers * bytes_each


def training_passes(recipe: Recipe, steps: Sequence[int] | None = None) -> list[Pass]:
    """What is computed of each token in the mean over these steps of a training, over all if none are given,
    and over their draws."""
    recurrence: Recurrence = recipe.component("recurrence")
    shape = recipe.component("backbone").shape
    sampled = _sampled(recurrence, range(recipe.run.steps) if steps is None else steps)
    lists = Counter(tuple(recurrence.passes_at(shape, step)) for step in sampled)
    return [
        replace(one, times=one.times * share / len(sampled))
        for passes, share in lists.items()
        for one in passes
    ]


def dearest_step(recipe: Recipe) -> int:
    """The step of a training that sends the most slots through the layers with gradients, the last of several
    such."""
    recurrence: Recurrence = recipe.component("recurrence")
    shape = recipe.component("backbone").shape

    def slots(step: int) -> float:
        passes = recurrence.passes_at(shape, step)
        return sum(one.token_passes(shape.num_layers) for one in passes if one.gradients)

    last = recipe.run.steps - 1
    return max([last, *reversed(_sampled(recurrence, range(last)))], key=slots)


def _sampled(recurrence: Recurrence, steps: Sequence[int]) -> list[int]:
    """Those steps that tell of all: of very many, one that is drawn from each of parts of equal length, so
    that what comes back every few steps is met as often as it comes."""
    parts = 1 if type(recurrence).passes_at is Recurrence.passes_at else SAMPLED
    if len(steps) <= parts:
        return list(steps)
    bounds = [len(steps) * part // parts for part in range(parts + 1)]
    drawn = random.Random(0)
    return [steps[drawn.randrange(*part)] for part in itertools.pairwise(bounds)]


def operations_of(
    recipe: Recipe, passes: Iterable[Pass], *, length: int | None = None, backward: bool = False
) -> float:
    """Of one token in a sequence of `length`, `run.sequence_tokens` if not given: of these passes and the
    head, forward alone or with the backward pass through those of them that have one."""
    backbone: Backbone = recipe.component("backbone")
    shape, cost = backbone.shape, backbone.layer_cost
    length = recipe.run.sequence_tokens if length is None else length
    head = 2 * shape.hidden_size * shape.vocab_size
    total = float((1 + BACKWARD * backward) * head)
    for one in passes:
        forward = one.times * (one.layer_operations(cost, shape.num_layers, length) + one.operations)
        total += (1 + BACKWARD * (backward and one.gradients)) * forward
    return total


def ledger(recipe: Recipe, *, length: int | None = None, steps: Sequence[int] | None = None) -> Ledger:
    """Costs of `recipe` for sequences of `length` tokens, `run.sequence_tokens` if not given, in these steps
    of its training, in the mean over all if none are given."""
    backbone: Backbone = recipe.component("backbone")
    recurrence: Recurrence = recipe.component("recurrence")
    checkpointing: ActivationCheckpoint = recipe.component("activation_checkpoint")
    shape, cost = backbone.shape, backbone.layer_cost
    length = recipe.run.sequence_tokens if length is None else length
    model = build_model(recipe, device="meta")

    def token_passes(passes: Iterable[Pass]) -> float:
        return sum(one.token_passes(shape.num_layers) for one in passes)

    training = training_passes(recipe, steps)
    evaluating = recurrence.passes(shape, training=False)
    decoding = recurrence.decode_passes(shape)
    return Ledger(
        length=length,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=sum(
            parameter.numel()
            for part in (model.decoder.blocks, model.decoder.final_norm)
            for parameter in part.parameters()
        ),
        training_token_passes=token_passes(training),
        evaluation_token_passes=token_passes(evaluating),
        inference_token_passes=token_passes(decoding),
        training_operations=operations_of(recipe, training, length=length, backward=True),
        repeated_operations=sum(
            one.times * one.layer_operations(part, shape.num_layers, length)
            for one in training
            if one.gradients
            for part in checkpointing.again(cost)
        ),
        evaluation_operations=operations_of(recipe, evaluating, length=length),
        inference_operations=operations_of(recipe, decoding, length=length),
        cached_numbers=cost.cached * shape.num_layers * token_passes(decoding),
    )
