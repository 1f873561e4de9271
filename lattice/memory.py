"""Memory of a training step, by part: of real tensors, or predicted on fake ones, which hold none.

A fake computation allocates nothing and costs only the time of its Python: it tells the peak of a model that
this machine could not hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from lattice.attention_mask import BLOCKS_FROM, made_up_documents
from lattice.build import undrawn_model
from lattice.draws import Draw, Most
from lattice.ledger import dearest_step
from lattice.live_tensors import LiveTensors
from lattice.model import LanguageModel
from lattice.optimizer_state import check_state
from lattice.protocols import Optimizer, Precision, kind_of
from lattice.recipe import Recipe
from lattice.registry import lookup, place_of


class NotPredicted(ValueError):
    """What a step computes depends on values, which fake tensors do not have."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a training step on one device when it needs the most, by part."""

    parameters: int
    gradients: int
    """Those that are there by then."""
    optimizer: int
    logits: int
    """Of a chunk of the loss: with their softmax and their gradient."""
    activations: int
    """All else: what the backward pass needs, casts of weights, what an operation has in hand."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.logits + self.activations

    def towards(self, other: StepMemory, share: float) -> StepMemory:
        """Part by part, this share of the way from here to the other."""
        mine, theirs = asdict(self), asdict(other)
        return StepMemory(**{part: round(mine[part] + share * (theirs[part] - mine[part])) for part in mine})


def step_memory(
    recipe: Recipe, *, rows: int, length: int, micro_batches: int = 1, gpu: bool = False
) -> StepMemory:
    """Predicted for a step of `micro_batches`, each of `rows` sequences of `length` tokens, with the most
    iterations that it may draw, by computing one of them on fake tensors, after the optimizer's first step.
    It is the last step of the training, where what thinks more from step to step thinks most, or of a
    curriculum the dearest one. On a `gpu` attention over long sequences holds no pairs of slots, whatever the
    mask. Raises NotPredicted."""
    optimizer: Optimizer = recipe.component("optimizer")
    given: Precision = recipe.component("precision")
    precision = given.as_in_memory
    # A recurrence may use tensors of its module, which are real.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        with _predicting("recurrence", recipe):
            model = undrawn_model(recipe)
        precision.apply(model)
        if gpu and length >= BLOCKS_FROM:
            model.mask = lookup("mask", "causal")()  # needs what a block mask does
        ids_BL = torch.zeros(rows, length, dtype=torch.int64)
        documents_BL = made_up_documents(model.mask, ids_BL)
        if micro_batches > 1:  # from the second on, all gradients are there from the start
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        most = Most(recipe.run.seed, dearest_step(recipe))
        with _predicting("recurrence", recipe):
            live = traced_step(model, ids_BL, precision, documents_BL=documents_BL, draw=most)
        with _predicting("optimizer", recipe):
            updated = optimizer.build(model)
            updated.step()
        check_state(kind_of(optimizer), updated, dict(model.named_parameters()))
        states = (value for state in updated.state.values() for value in state.values())
        moments = _bytes(value for value in states if isinstance(value, Tensor) and value.dim())
        weights = _bytes(model.parameters())
        gradients = _bytes(_gradients(model))
    parts = live.at_peak()
    if live.peak < weights + gradients:  # in the optimizer's step, when all else is gone
        parts = Counter(parameters=weights, gradients=gradients)
    return StepMemory(
        parameters=parts["parameters"],
        gradients=parts["gradients"],
        optimizer=moments,
        logits=parts["logits"],
        activations=parts["other"],
    )


@contextmanager
def _predicting(role: str, recipe: Recipe) -> Iterator[None]:
    """In this context the component of that role computes, on fake tensors."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise NotPredicted(
            f"{role} '{kind_of(recipe.component(role))}': what it computes depends on values: memory is not "
            f"predicted{place_of(error)}"
        ) from error


def traced_step(
    model: LanguageModel,
    ids_BL: Tensor,
    precision: Precision,
    *,
    documents_BL: Tensor | None = None,
    draw: Draw | None = None,
) -> LiveTensors:
    """Forward and backward of a training step, followed: `parameters`, `gradients`, `logits` and `other`.
    `draw` is the first step's, with the most that it may draw, if not given. Gradients stay; to those that
    are there it adds."""
    vocabulary = model.shape.vocab_size

    def label(tensor: Tensor) -> str:
        predicts = tensor.dim() > 1 and tensor.shape[-1] == vocabulary and tensor.is_floating_point()
        return "logits" if predicts else "other"

    held = [*model.parameters(), *model.buffers()]
    batch = [ids_BL] if documents_BL is None else [ids_BL, documents_BL]
    live = LiveTensors([*held, *_gradients(model), *batch], label)
    live.rename(held, "parameters")
    with live:
        with precision.autocast(ids_BL.device):
            loss = model(ids_BL, documents=documents_BL, targets=ids_BL, draw=draw or Most(0, 0)).objective
        assert loss is not None
        loss.backward()
        del loss
    live.rename(_gradients(model), "gradients")
    return live


def _gradients(model: LanguageModel) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
