"""What a rank sends and receives in a training step, on paper.

Weights, gradients and optimizer state are sharded over n ranks (FSDP, arXiv 2304.11277), of which there may
be R replicas (HSDP). Of W bytes of weights and G bytes of gradients, rings move through a rank

    all-gather of the weights              (n-1)/n · W
    reduce-scatter of the gradients        (n-1)/n · G
    all-reduce over the replicas         2 (R-1)/R · G/n

(Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009). Layers are gathered in the format in
which matrix products read them, embedding and head in float32; gradients are summed in float32.

A step of m micro-batches and P passes through the layers gathers each layer once, or once a pass: m·P times
forward, m·P times backward, and at most as often again as activation checkpointing computes it again (one
that does so layer by layer finds it gathered); then it also sums the gradients of each micro-batch.

Within a node a rank has its `link`. A ring over several nodes crosses each node's edge over all its network
cards at once: it has the smaller of `link` and the node's network together. A replica's ranks each have their
own card.
"""

from __future__ import annotations

from dataclasses import dataclass

from lattice.hardware import GPU
from lattice.ledger import Ledger, training_passes
from lattice.protocols import ActivationCheckpoint, Backbone, Precision
from lattice.recipe import Recipe

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of a rank in an optimizer step."""

    reshard: str
    """When gathered weights are given up again: after the "step" or after each "pass"."""
    shards: int
    replicas: int
    layer_gathers: float
    """How often each layer is gathered, in the mean over the steps and their draws."""
    gathered: float
    """Bytes of weights."""
    reduced: float
    """Bytes of gradients."""
    seconds: float
    """At the stated bandwidth, if nothing is computed meanwhile."""
    share: float
    """Of the seconds in which the step is computed."""


def traffic(
    recipe: Recipe, costs: Ledger, gpu: GPU, gpus: int, *, micro_batches: int, compute_seconds: float
) -> list[Traffic]:
    """Sharded over all GPUs, and where these are several nodes also over each node alone; gathered once a
    step, and once a pass."""
    layouts = [(gpus, 1)]
    if gpus > gpu.node and gpus % gpu.node == 0:
        layouts.append((gpu.node, gpus // gpu.node))
    return [
        _traffic(recipe, costs, gpu, layout, reshard, micro_batches, compute_seconds)
        for layout in layouts
        for reshard in ("step", "pass")
    ]


def slots_to_hide(recipe: Recipe, gpu: GPU, ranks: int, utilization: float) -> float:
    """Slots that a rank sends through a layer in the time in which the layer is gathered: 2 operations a
    weight and slot, against its bytes."""
    precision: Precision = recipe.component("precision")
    return gpu.peak * utilization * precision.weights.itemsize / (2 * bandwidth(gpu, ranks))


def bandwidth(gpu: GPU, ranks: int) -> float:
    """Bytes a second through a rank, of a ring over `ranks` GPUs that fill nodes one after the other."""
    return gpu.link if ranks <= gpu.node else min(gpu.link, gpu.node * gpu.network)


def _traffic(
    recipe: Recipe,
    costs: Ledger,
    gpu: GPU,
    layout: tuple[int, int],
    reshard: str,
    micro_batches: int,
    compute_seconds: float,
) -> Traffic:
    shards, replicas = layout
    precision: Precision = recipe.component("precision")
    others = costs.parameters - costs.layer_parameters
    once = reshard == "step"
    times = 1 if once else micro_batches
    gathers = 1.0 if once else micro_batches * _gathers(recipe)
    part = (shards - 1) / shards
    gathered = part * (
        gathers * precision.weights.itemsize * costs.layer_parameters + times * FLOAT32 * others
    )
    scattered = part * times * FLOAT32 * costs.parameters
    summed = times * 2 * (replicas - 1) / replicas * FLOAT32 * costs.parameters / shards
    between = gpu.network if shards * replicas > gpu.node else gpu.link
    seconds = (gathered + scattered) / bandwidth(gpu, shards) + summed / between
    return Traffic(
        reshard=reshard,
        shards=shards,
        replicas=replicas,
        layer_gathers=gathers,
        gathered=gathered,
        reduced=scattered + summed,
        seconds=seconds,
        share=seconds / compute_seconds,
    )


def _gathers(recipe: Recipe) -> float:
    """Of each layer in a micro-batch, where it is given up after each use."""
    backbone: Backbone = recipe.component("backbone")
    checkpointing: ActivationCheckpoint = recipe.component("activation_checkpoint")
    layers = backbone.shape.num_layers
    return sum(
        one.runs(recipe.run.sequence_tokens)
        * (layers if one.layers is None else one.layers)
        / layers
        * (2 + len(checkpointing.again(backbone.layer_cost)) if one.gradients else 1)
        for one in training_passes(recipe)
    )
