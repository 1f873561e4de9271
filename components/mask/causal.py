"""Plain causal order over the slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lattice.components.mask._tokens import and_itself, causal_and_real
from lattice.protocols import Mask
from lattice.registry import register
from lattice.slots import Slots


@register("mask", "causal")
@dataclass(frozen=True, kw_only=True)
class Causal(Mask):
    """A slot sees itself and every slot before it; padding is not seen."""

    @property
    def needs_documents(self) -> bool:
        return False

    def allowed(self, queries: Slots, keys: Slots) -> Tensor | None:
        if keys.real_BS is None:
            return None
        return and_itself(causal_and_real(queries, keys), queries, keys)
