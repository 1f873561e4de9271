"""Nothing is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.model import LanguageModel
from lattice.protocols import Compile
from lattice.registry import register


@register("compile", "none")
@dataclass(frozen=True, kw_only=True)
class Eager(Compile):
    """Every operation as it comes."""

    def apply(self, model: LanguageModel) -> None:
        pass
