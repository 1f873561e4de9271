"""Layers compiled by torch.compile, each by itself.

Those are for the few lengths of training; what has no gradients to compute, decoding and evaluation, runs the
layers as they are written (lattice.hardware.any_length).

Never the loop over passes: one graph with several checkpointed traversals of the same layers peaks at 2.3 to
3.5 times the memory of eager execution (pytorch#193193), and every drawn count would be another graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lattice.graphs import allow_graphs, keep_no_cheap_values
from lattice.model import LanguageModel
from lattice.protocols import Compile
from lattice.registry import register


@register("compile", "block")
@dataclass(frozen=True, kw_only=True)
class CompileBlock(Compile):
    """Each layer compiled; layers share their graphs."""

    backend: str = "inductor"
    """Of torch.compile; those with "eager" in their name build the graphs and generate no code."""

    fullgraph: bool = False
    """As of torch.compile: what can be in no graph is an error, in place of computed without one. Writing to
    a cache is, as Gauss-Seidel sweeps do."""

    def __post_init__(self) -> None:
        known = [*torch.compiler.list_backends(), "aot_eager", "aot_eager_decomp_partition", "eager"]
        if self.backend not in known:
            raise ValueError(f"backend = '{self.backend}': must be one of {', '.join(known)}")

    def apply(self, model: LanguageModel) -> None:
        allow_graphs()
        keep_no_cheap_values()
        for block in model.decoder.blocks:
            # Shapes are those of the recipe's batches: a graph for them is faster than one for all shapes.
            block.compile(backend=self.backend, fullgraph=self.fullgraph, dynamic=False)
