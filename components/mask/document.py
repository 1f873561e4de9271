"""Causal order within documents that are packed into one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lattice.components.mask._tokens import and_itself, causal_and_real
from lattice.protocols import Mask
from lattice.registry import register
from lattice.slots import Slots


@register("mask", "document")
@dataclass(frozen=True, kw_only=True)
class Document(Mask):
    """As causal, and the tokens and thoughts of one document never see another's.

    Positions run on over the packed sequence: rotary attention sees their differences alone, so within a
    document it is as if they started at 0.
    """

    @property
    def needs_documents(self) -> bool:
        return True

    def allowed(self, queries: Slots, keys: Slots) -> Tensor | None:
        if queries.document_BS is None or keys.document_BS is None:
            if keys.real_BS is None:
                return None  # no documents given: every row is one document
            return and_itself(causal_and_real(queries, keys), queries, keys)
        same_BQK = queries.document_BS[:, :, None] == keys.document_BS[:, None]
        return and_itself(causal_and_real(queries, keys) & same_BQK, queries, keys)
