"""Weights sharded by FSDP2, a layer a unit, and gathered once a step or once a pass.

Matrices are sharded. Norms' weights and biases, a thousandth of a model, stay whole on every rank in float32:
matrices can then be gathered in the format in which products take them, as autocast would cast them, while
all else stays as precise as on one device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector

from lattice.memory import StepMemory
from lattice.model import LanguageModel
from lattice.protocols import Parallel
from lattice.split import Split
from lattice.spread import Site, Spread

CALLED = ("hidden_states", "prefill", "step")
"""What else than `forward` uses the weights of the model's own unit: embedding, head and the recurrence's."""


@dataclass(frozen=True, kw_only=True)
class Resharding(Parallel):
    """When gathered weights are given up."""

    reshard: Literal["step", "pass", "auto"] = "auto"
    """After a `step`, so that each weight is gathered once in it however many passes there are; after each
    `pass`, which needs less memory; `auto` is "step" where that fits."""

    def once(self, site: Site) -> bool:
        """Whether weights are gathered once a step."""
        return self._once(bool(site.gathered_fits))

    def sharded_memory(self, alone: StepMemory, shards: int, *, gathered: bool) -> StepMemory:
        """A rank's shards, and beside them all weights of a step and as many gradients; those of a layer,
        where more are not there, are left out."""
        beside = alone.parameters if self._once(gathered) and shards > 1 else 0
        return replace(
            alone,
            parameters=alone.parameters // shards + beside,
            gradients=alone.gradients // shards + beside,
            optimizer=alone.optimizer // shards,
        )

    def _once(self, fits: bool) -> bool:
        return self.reshard == "step" or (self.reshard == "auto" and fits)


@dataclass(frozen=True, kw_only=True)
class Neighbours(Resharding):
    """Neighbouring ranks work on the same sequences together."""

    degree: int
    """How many."""

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ValueError(f"degree = {self.degree}: must be at least 1")

    def together(self, size: int) -> int:
        if size % self.degree:
            raise ValueError(f"degree = {self.degree}: must divide the {size} ranks")
        return self.degree


def shard_matrices(model: LanguageModel, mesh: DeviceMesh, site: Site, *, once: bool) -> None:
    """`mesh` has a dimension of shards, and before it one of replicas if there are any."""
    # A layer's outputs are views, which FSDP2 warns not to write in place; nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    vectors = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    cast_to = None if site.weights == torch.float32 else site.weights
    # What goes into a layer is not cast: the residual stream keeps its precision.
    policy = MixedPrecisionPolicy(param_dtype=cast_to, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.decoder.blocks:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=not once, ignored_params=vectors
        )
        register_fsdp_forward_method(block, "alone")
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=False, ignored_params=vectors)
    for name in CALLED:
        register_fsdp_forward_method(model, name)
    for module in _units(model):
        # Losses are divided by the targets of all ranks: gradients are summed, by an operation gloo has too.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if once:
            module.set_reshard_after_backward(False, recurse=False)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class Sharded(Spread):
    """A model that `shard_matrices` has sharded."""

    def __init__(
        self, model: LanguageModel, *, once: bool, split: Split | None = None, copies: int = 1
    ) -> None:
        super().__init__(model, split=split, copies=copies)
        self._units = _units(model)
        self._once = once
        mesh = cast("DTensor", model.decoder.embedding.weight).device_mesh
        self._groups = [
            mesh.get_group(dimension) for dimension in range(mesh.ndim) if mesh.size(dimension) > 1
        ]
        self._vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        root = self._units[0]
        root.set_is_last_backward(last)
        # Else after every one: gradients of all weights are never there whole, and those of a layer may be
        # known in two parts, which FSDP2 cannot keep for the replicas.
        root.set_requires_gradient_sync(last or not self._once)
        yield

    @torch.no_grad()
    def finish(self) -> None:
        if self._once:
            for unit in self._units:
                unit.reshard()
        gradients = [_local(vector.grad) for vector in self._vectors if vector.grad is not None]
        if not gradients:
            return
        flat_N = parameters_to_vector(gradients)
        for group in self._groups:
            dist.all_reduce(flat_N, group=group)
        pieces = torch.split(flat_N, [gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, pieces, strict=True):
            gradient.copy_(summed.view_as(gradient))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are gathered, and stay until the end."""
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        with super().whole():
            yield
        for unit in self._units:
            unit.reshard()
        for unit in self._units[1:]:
            unit.set_reshard_after_forward(not self._once, recurse=False)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
