"""The ledger: what a recipe costs, added up from what its components declare (lattice.cost).

Operations are the model's; what activation checkpointing computes again is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lattice.build import build_model
from lattice.cost import Pass
from lattice.protocols import ActivationCheckpoint, Backbone, Recurrence
from lattice.recipe import Recipe

BACKWARD = 2
"""Operations of the backward pass for each of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Costs of one recipe at one sequence length; all but the parameters are for one token."""

    length: int
    """Tokens of a sequence."""
    parameters: int
    layer_parameters: int
    """Of the layers and the final norm alone: without embedding and head."""
    training_token_passes: float
    """Slots sent through all layers, in the mean over the draws."""
    evaluation_token_passes: float
    """The same with the counts of evaluation."""
    inference_token_passes: float
    """The same in sequential decoding, which is the definition."""
    training_operations: float
    """Forward and backward, head included, in the mean over the draws."""
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


def ledger(recipe: Recipe, *, length: int | None = None) -> Ledger:
    """Costs of `recipe` for sequences of `length` tokens, `run.sequence_tokens` if not given."""
    backbone: Backbone = recipe.component("backbone")
    recurrence: Recurrence = recipe.component("recurrence")
    checkpointing: ActivationCheckpoint = recipe.component("activation_checkpoint")
    shape, cost = backbone.shape, backbone.layer_cost
    length = recipe.run.sequence_tokens if length is None else length
    model = build_model(recipe, device="meta")
    head = 2 * shape.hidden_size * shape.vocab_size

    def forward(passes: Iterable[Pass]) -> float:
        return sum(
            one.times * (one.layer_operations(cost, shape.num_layers, length) + one.operations)
            for one in passes
        )

    def token_passes(passes: Iterable[Pass]) -> float:
        return sum(one.token_passes(shape.num_layers) for one in passes)

    training = recurrence.passes(shape, training=True)
    evaluating = recurrence.passes(shape, training=False)
    decoding = recurrence.decode_passes(shape)
    back = forward(one for one in training if one.gradients)
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
        training_operations=forward(training) + BACKWARD * back + (1 + BACKWARD) * head,
        repeated_operations=sum(
            one.times * one.layer_operations(part, shape.num_layers, length)
            for one in training
            if one.gradients
            for part in checkpointing.again(cost)
        ),
        evaluation_operations=forward(evaluating) + head,
        inference_operations=forward(decoding) + head,
        cached_numbers=cost.cached * shape.num_layers * token_passes(decoding),
    )
