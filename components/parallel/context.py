"""A sequence divided among ranks, for long ones: each attends from its own tokens to those of all.

Keys and values are gathered in every layer of every pass (as in Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.distributed.device_mesh import init_device_mesh

from lattice.components.parallel._sharding import Neighbours, Sharded, shard_matrices
from lattice.memory import StepMemory
from lattice.model import LanguageModel
from lattice.protocols import Shape
from lattice.registry import register
from lattice.split import Split
from lattice.spread import Site, Spread


@register("parallel", "context")
@dataclass(frozen=True, kw_only=True)
class ContextParallel(Neighbours):
    """Sequences divided among neighbouring ranks, weights (FSDP2) among all.

    A rank has some tokens of a sequence with all their thoughts."""

    def problems(self, shape: Shape, length: int, size: int) -> list[str]:
        if length % self.degree == 0:
            return []
        return [f"degree = {self.degree}: must divide run.sequence_tokens = {length}"]

    def memory(self, alone: StepMemory, size: int, *, gathered: bool) -> StepMemory:
        share = replace(
            alone, logits=alone.logits // self.degree, activations=alone.activations // self.degree
        )
        return self.sharded_memory(share, size, gathered=gathered)

    def tokens(self, batch_tokens: int) -> int:
        return batch_tokens // self.degree

    def shard(self, model: LanguageModel, site: Site) -> None:
        if site.world.size > 1:
            mesh = init_device_mesh(site.device.type, (site.world.size,), mesh_dim_names=("shard",))
            shard_matrices(model, mesh, site, once=self.once(site))

    def spread(self, model: LanguageModel, site: Site) -> Spread:
        if site.world.size == 1:
            return Spread(model)
        sequences = site.world.data_size, self.degree
        mesh = init_device_mesh(site.device.type, sequences, mesh_dim_names=("data", "context"))
        rank = site.world.rank % self.degree
        split = Split(mesh.get_group("context"), rank, self.degree)
        return Sharded(model, once=self.once(site), split=split)
