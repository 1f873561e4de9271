"""One process, one device."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.model import LanguageModel
from lattice.protocols import Parallel
from lattice.registry import register
from lattice.spread import Site, Spread


@register("parallel", "single")
@dataclass(frozen=True, kw_only=True)
class Single(Parallel):
    """One process on one device."""

    def together(self, size: int) -> int:
        if size > 1:
            raise ValueError(
                f"kind = 'single': is for one process, {size} of them would all train the same model: choose "
                "ddp, fsdp, tensor or context"
            )
        return 1

    def spread(self, model: LanguageModel, site: Site) -> Spread:
        return Spread(model)
