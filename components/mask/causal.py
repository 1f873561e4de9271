"""Plain causal order over the slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lattice.components.mask._visibility import Visibility
from lattice.protocols import Mask
from lattice.registry import register
from lattice.slots import Side


@register("mask", "causal")
@dataclass(frozen=True, kw_only=True)
class Causal(Visibility, Mask):
    """A slot sees itself and every slot before it; padding is not seen."""

    @property
    def needs_documents(self) -> bool:
        return False

    def sees(self, query: Side, key: Side) -> Tensor | None:
        return self.visible(query, key)
