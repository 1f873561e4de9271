"""Tensor parallelism within a layer (Megatron-LM, arXiv 1909.08053), alone or with sharding (FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from lattice.components.parallel._sharding import Sharded, shard_matrices, sharded_memory
from lattice.memory import StepMemory
from lattice.model import LanguageModel
from lattice.protocols import Parallel, Shape
from lattice.registry import register
from lattice.spread import Site, Spread


@register("parallel", "tensor")
@dataclass(frozen=True, kw_only=True)
class TensorParallel(Parallel):
    """Heads and the inner width of the layers divided among neighbouring ranks; among the others the batch is
    divided, and the weights are sharded.

    Embedding, norms and head are not divided. A pass sums two activations a layer over the neighbours: they
    should be on one host.
    """

    degree: int
    """Neighbouring ranks that share a layer."""
    reshard: Literal["step", "pass", "auto"] = "auto"
    """As that of `fsdp`, where there are more ranks than `degree`."""

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ValueError(f"degree = {self.degree}: must be at least 1")

    def together(self, size: int) -> int:
        if size % self.degree:
            raise ValueError(f"degree = {self.degree}: must divide the {size} ranks")
        return self.degree

    def problems(self, shape: Shape, length: int, size: int) -> list[str]:
        if shape.splits % self.degree == 0:
            return []
        return [
            f"degree = {self.degree}: must divide the backbone's numbers of heads and its inner width, "
            f"whose greatest common divisor is {shape.splits}"
        ]

    def memory(self, alone: StepMemory, size: int, *, gathered: bool) -> StepMemory:
        """As if the weights of the layers were all there are."""
        once = self.reshard == "step" or (self.reshard == "auto" and gathered)
        divided = sharded_memory(alone, self.degree, once=False)
        return sharded_memory(divided, size // self.degree, once=once)

    def shard(self, model: LanguageModel, site: Site) -> None:
        if site.world.size == 1:
            return
        mesh = init_device_mesh(
            site.device.type, (site.world.data_size, self.degree), mesh_dim_names=("shard", "tensor")
        )
        _divide(model, mesh["tensor"])
        if site.world.data_size > 1:
            shard_matrices(model, mesh["shard"], site, once=self._once(site))

    def spread(self, model: LanguageModel, site: Site) -> Spread:
        spread = Sharded(model, once=self._once(site)) if site.world.data_size > 1 else Spread(model)
        spread.copies = site.world.together
        return spread

    def _once(self, site: Site) -> bool:
        return self.reshard == "step" or (self.reshard == "auto" and bool(site.gathered_fits))


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
