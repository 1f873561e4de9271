"""Weights, gradients and optimizer state sharded over the ranks: FSDP2 (Zhao et al., arXiv 2304.11277)."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lattice.components.parallel._sharding import Resharding, Sharded, shard_matrices
from lattice.memory import StepMemory
from lattice.model import LanguageModel
from lattice.registry import register
from lattice.spread import Site, Spread


@register("parallel", "fsdp")
@dataclass(frozen=True, kw_only=True)
class FSDP(Resharding):
    """Weights sharded over all ranks, or over groups that each hold one replica (HSDP).

    Gradients are reduced in float32; weights are gathered in the format in which `precision` computes.
    """

    replicas: int = 1
    """Groups of ranks that each hold the model, sharded within the group alone."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas = {self.replicas}: must be at least 1")

    def together(self, size: int) -> int:
        if size % self.replicas:
            raise ValueError(f"replicas = {self.replicas}: must divide the {size} ranks")
        return 1

    def memory(self, alone: StepMemory, size: int, *, gathered: bool) -> StepMemory:
        return self.sharded_memory(alone, size // self.replicas, gathered=gathered)

    def shard(self, model: LanguageModel, site: Site) -> None:
        if site.world.size > 1:
            shard_matrices(model, self._mesh(site), site, once=self.once(site))

    def spread(self, model: LanguageModel, site: Site) -> Spread:
        if site.world.size == 1:
            return Spread(model)
        return Sharded(model, once=self.once(site))

    def _mesh(self, site: Site) -> DeviceMesh:
        shards = site.world.size // self.replicas
        if self.replicas == 1:
            return init_device_mesh(site.device.type, (shards,), mesh_dim_names=("shard",))
        names = ("replica", "shard")
        return init_device_mesh(site.device.type, (self.replicas, shards), mesh_dim_names=names)
