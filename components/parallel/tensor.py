"""Tensor parallelism within a layer (Megatron-LM, arXiv 1909.08053), alone or with sharding (FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from lattice.components.parallel._sharding import Neighbours, Sharded, shard_matrices
from lattice.memory import StepMemory
from lattice.model import LanguageModel
from lattice.protocols import Shape
from lattice.registry import register
from lattice.spread import Site, Spread


@register("parallel", "tensor")
@dataclass(frozen=True, kw_only=True)
class TensorParallel(Neighbours):
    """Layers divided among neighbouring ranks, batch and weights (FSDP2) among the others.

    What is divided are heads and inner width, not embedding, norms and head. A pass sums two activations a
    layer over the neighbours: they should be on one host.
    """

    def problems(self, shape: Shape, length: int, size: int) -> list[str]:
        if shape.splits % self.degree == 0:
            return []
        return [
            f"degree = {self.degree}: must divide the backbone's numbers of heads and its inner width, "
            f"whose greatest common divisor is {shape.splits}"
        ]

    def memory(self, alone: StepMemory, size: int, *, gathered: bool) -> StepMemory:
        """As if the weights of the layers were all there are."""
        names = ("parameters", "gradients", "optimizer")
        divided = replace(alone, **{name: getattr(alone, name) // self.degree for name in names})
        return self.sharded_memory(divided, size // self.degree, gathered=gathered)

    def shard(self, model: LanguageModel, site: Site) -> None:
        if site.world.size == 1:
            return
        mesh = init_device_mesh(
            site.device.type, (site.world.data_size, self.degree), mesh_dim_names=("shard", "tensor")
        )
        _divide(model, mesh["tensor"])
        if site.world.data_size > 1:
            shard_matrices(model, mesh["shard"], site, once=self.once(site))

    def spread(self, model: LanguageModel, site: Site) -> Spread:
        copies = site.world.together
        if site.world.data_size == 1:
            return Spread(model, copies=copies)
        return Sharded(model, once=self.once(site), copies=copies)


def _divide(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Linears that write to the residual stream by their inputs, the others by their outputs."""
    writers = {id(linear) for linear in model.decoder.residual_projections()}
    for block in model.decoder.blocks:
        linears = [(name, one) for name, one in block.named_modules() if isinstance(one, nn.Linear)]
        plan: dict[str, ParallelStyle] = {
            name: RowwiseParallel() if id(linear) in writers else ColwiseParallel()
            for name, linear in linears
        }
        parallelize_module(block, mesh, plan)
