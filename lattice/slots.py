"""Slots: the positions of the interleaved sequence a model with latent thoughts runs over.

With n stages a token, slot (t, i) lies at index t·n + i: `x_0 z¹_0 … x_1 z¹_1 …`. All slots of a token share
its position id, its document and its padding. Order over (token, stage) is the causal order, whether
the slots come from one interleaved pass, from one stage alone, or from a cache.

Shapes: B batch, L tokens, S slots, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What a batch says about its tokens."""

    index_L: Tensor
    """Place of each token in its sequence, counting those in the cache."""
    stop: int
    """The place after the last token's."""
    position_BL: Tensor
    """Position ids, (1, L) where all rows agree."""
    document_BL: Tensor | None = None
    """Document numbers; None where every row is one document."""
    real_BL: Tensor | None = None
    """False for padding; None where nothing is padded."""

    @property
    def first(self) -> int:
        """The place of the first token."""
        return self.stop - len(self.index_L)

    def part(self, at: slice) -> Tokens:
        """Some consecutive ones of them."""

        def cut(values: Tensor | None) -> Any:
            return None if values is None else values[..., at]

        index_L = self.index_L[at]
        stop = self.first + range(len(self.index_L))[at].stop
        return Tokens(index_L, stop, cut(self.position_BL), cut(self.document_BL), cut(self.real_BL))

    @staticmethod
    def of(
        ids_BL: Tensor,
        attention_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        *,
        first: int = 0,
        past_real_B: Tensor | None = None,
    ) -> Tokens:
        """Positions count the real tokens of a row, so that a left-padded row equals the row alone.

        `first` tokens, `past_real_B` of them real in each row, came before (they are in a cache).
        """
        length = ids_BL.shape[1]
        index_L = torch.arange(first, first + length, device=ids_BL.device)
        if attention_mask_BL is None and past_real_B is None:
            return Tokens(index_L, first + length, index_L[None], documents_BL)
        real_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        if attention_mask_BL is not None:
            real_BL = attention_mask_BL.to(ids_BL.device).bool()
        counted_BL = real_BL.long().cumsum(dim=1) - 1
        if past_real_B is not None:
            counted_BL = counted_BL + past_real_B[:, None]
        return Tokens(index_L, first + length, counted_BL.clamp(min=0), documents_BL, real_BL)


@dataclass(frozen=True)
class Side:
    """One side of pairs of slots, queries or keys, in shapes that broadcast against the other side's."""

    token: Tensor
    """Place of the token in its sequence."""
    stage: Tensor
    document: Tensor | None
    """Number of the document; None where every row is one."""
    real: Tensor | None
    """False for padding; None where nothing is padded."""
    stop: int
    """The place after the last token's."""
    last_stage: int
    """The highest stage of any slot on this side."""


@dataclass(frozen=True)
class Slots:
    """Which token and stage each slot belongs to, and what holds for that token."""

    token_S: Tensor
    stop: int
    """The place after the last token's."""
    stage_S: Tensor
    position_BS: Tensor
    document_BS: Tensor | None = None
    real_BS: Tensor | None = None
    last_stage: int = 0
    """The highest stage of any slot."""

    @staticmethod
    def interleaved(tokens: Tokens, stages: int, first_stage: int = 0) -> Slots:
        """Slots of all `tokens` with stages first_stage .. first_stage + stages - 1, token-major."""

        def spread(values: Tensor | None) -> Any:
            return None if values is None else values.repeat_interleave(stages, dim=-1)

        stage_n = torch.arange(first_stage, first_stage + stages, device=tokens.index_L.device)
        return Slots(
            spread(tokens.index_L),
            tokens.stop,
            stage_n.repeat(len(tokens.index_L)),
            spread(tokens.position_BL),
            spread(tokens.document_BL),
            spread(tokens.real_BL),
            first_stage + stages - 1,
        )

    def queries(self) -> Side:
        """As the first of a pair, (B or 1, Q, 1)."""
        return self._side(lambda values: values[:, :, None])

    def keys(self) -> Side:
        """As the second of a pair, (B or 1, 1, K)."""
        return self._side(lambda values: values[:, None])

    def at(self, row: Tensor, index: Tensor) -> Side:
        """The slot at `index` of batch row `row`, as scalars: what a mask of FlexAttention is asked about."""
        return self._side(lambda values: values[row if len(values) > 1 else 0, index])

    def _side(self, take: Callable[[Tensor], Tensor]) -> Side:
        def maybe(values: Tensor | None) -> Tensor | None:
            return None if values is None else take(values)

        return Side(
            token=take(self.token_S[None]),
            stage=take(self.stage_S[None]),
            document=maybe(self.document_BS),
            real=maybe(self.real_BS),
            stop=self.stop,
            last_stage=self.last_stage,
        )

    def part(self, start: int, end: int, stop: int) -> Slots:
        """The slots at indices start .. end - 1; `stop` is the place after their last token."""

        def cut(values: Tensor | None) -> Any:
            return None if values is None else values[..., start:end]

        return Slots(
            cut(self.token_S),
            stop,
            cut(self.stage_S),
            cut(self.position_BS),
            cut(self.document_BS),
            cut(self.real_BS),
            self.last_stage,
        )

    def followed_by(self, more: Slots) -> Slots:
        """These slots and then `more`, as a cache grows."""

        def join(ours: Tensor | None, theirs: Tensor | None) -> Any:
            if ours is None or theirs is None:
                assert ours is theirs, "a cache cannot mix padded with unpadded tokens"
                return None
            rows = max(ours.shape[0], theirs.shape[0])
            return torch.cat([ours.expand(rows, -1), theirs.expand(rows, -1)], dim=1)

        return Slots(
            torch.cat([self.token_S, more.token_S]),
            max(self.stop, more.stop),
            torch.cat([self.stage_S, more.stage_S]),
            join(self.position_BS, more.position_BS),
            join(self.document_BS, more.document_BS),
            join(self.real_BS, more.real_BS),
            max(self.last_stage, more.last_stage),
        )
