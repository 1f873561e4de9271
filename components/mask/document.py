"""Causal order within documents that are packed into one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lattice.components.mask._visibility import Visibility, both
from lattice.protocols import Mask
from lattice.registry import register
from lattice.slots import Side


@register("mask", "document")
@dataclass(frozen=True, kw_only=True)
class Document(Visibility, Mask):
    """As causal, and the tokens and thoughts of one document never see another's.

    Positions run on over the packed sequence: rotary attention sees their differences alone, so within a
    document it is as if they started at 0.
    """

    @property
    def needs_documents(self) -> bool:
        return True

    def sees(self, query: Side, key: Side) -> Tensor | None:
        same = None
        if query.document is not None and key.document is not None:
            same = query.document == key.document
        return both(self.visible(query, key), same)
