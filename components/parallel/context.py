"""A sequence divided among ranks, for long ones: each attends from its own tokens to those of all.

Keys and values are gathered in every layer of every pass (as in Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch.distributed.device_mesh import init_device_mesh

from lattice.components.parallel._sharding import Sharded, shard_matrices, sharded_memory
from lattice.memory import StepMemory
from lattice.model import LanguageModel
from lattice.protocols import Parallel, Shape
from lattice.registry import register
from lattice.split import Split
from lattice.spread import Site, Spread


@register("parallel", "context")
@dataclass(frozen=True, kw_only=True)
class ContextParallel(Parallel):
    """Neighbouring ranks share a sequence, each has some of its tokens with their thoughts; weights are
    sharded over all ranks (FSDP2)."""

    degree: int
    """Neighbouring ranks that share a sequence."""
    reshard: Literal["step", "pass", "auto"] = "auto"
    """As that of `fsdp`."""

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ValueError(f"degree = {self.degree}: must be at least 1")

    def together(self, size: int) -> int:
        if size % self.degree:
            raise ValueError(f"degree = {self.degree}: must divide the {size} ranks")
        return self.degree

    def problems(self, shape: Shape, length: int, size: int) -> list[str]:
        if length % self.degree == 0:
            return []
        return [f"degree = {self.degree}: must divide run.sequence_tokens = {length}"]

    def memory(self, alone: StepMemory, size: int, *, gathered: bool) -> StepMemory:
        once = self.reshard == "step" or (self.reshard == "auto" and gathered)
        share = replace(
            alone, logits=alone.logits // self.degree, activations=alone.activations // self.degree
        )
        return sharded_memory(share, size, once=once)

    def shard(self, model: LanguageModel, site: Site) -> None:
        if site.world.size > 1:
            mesh = init_device_mesh(site.device.type, (site.world.size,), mesh_dim_names=("shard",))
            shard_matrices(model, mesh, site, once=self._once(site))

    def spread(self, model: LanguageModel, site: Site) -> Spread:
        if site.world.size == 1:
            return Spread(model)
        sequences = site.world.data_size, self.degree
        mesh = init_device_mesh(site.device.type, sequences, mesh_dim_names=("data", "context"))
        rank = site.world.rank % self.degree
        split = Split(mesh.get_group("context"), rank, self.degree)
        return Sharded(model, once=self._once(site), split=split)

    def _once(self, site: Site) -> bool:
        return self.reshard == "step" or (self.reshard == "auto" and bool(site.gathered_fits))
