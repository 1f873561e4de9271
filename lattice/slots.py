"""Slots: the positions of the interleaved sequence a model with latent thoughts runs over.

With n stages a token, slot (t, i) lies at index t·n + i: `x_0 z¹_0 … x_1 z¹_1 …`. All slots of a token share
its position id, its document and its padding. Order over (token, stage) is the causal order, whether
the slots come from one interleaved pass, from one stage alone, or from a cache.

A row may branch: tokens of a context come first, then those of one continuation after the other, each of
which goes on where the context ends and sees the context and itself.

Shapes: B batch, L tokens, S slots, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What a batch says about its tokens."""

    index_BL: Tensor
    """Place of each token in its text, counting those in the cache; (1, L) where no row branches."""
    stop: int
    """Tokens of a row up to the last of these."""
    position_BL: Tensor
    """Position ids, (1, L) where all rows agree."""
    document_BL: Tensor | None = None
    """Document numbers; None where every row is one document."""
    real_BL: Tensor | None = None
    """False for padding; None where nothing is padded."""
    branch_BL: Tensor | None = None
    """Number of the continuation that a token is of, 0 for the context, -1 for padding; None where no row
    branches."""

    @property
    def length(self) -> int:
        return self.index_BL.shape[1]

    @property
    def first(self) -> int:
        """Tokens of a row before these."""
        return self.stop - self.length

    def part(self, at: slice) -> Tokens:
        """Some consecutive ones of them."""

        def cut(values: Tensor | None) -> Any:
            return None if values is None else values[..., at]

        stop = self.first + range(self.length)[at].stop
        return Tokens(
            cut(self.index_BL),
            stop,
            cut(self.position_BL),
            cut(self.document_BL),
            cut(self.real_BL),
            cut(self.branch_BL),
        )

    @staticmethod
    def of(
        ids_BL: Tensor,
        attention_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        branches_BL: Tensor | None = None,
        *,
        first: int = 0,
        past_real_B: Tensor | None = None,
    ) -> Tokens:
        """Positions count the real tokens of a row, so that a left-padded row equals the row alone.

        `first` tokens, `past_real_B` of them real in each row, came before (they are in a cache). Raises
        ValueError for what is said of other tokens than these.
        """
        check_alike(ids_BL, attention_mask=attention_mask_BL, documents=documents_BL, branches=branches_BL)
        stop = first + ids_BL.shape[1]
        index_BL = torch.arange(first, stop, device=ids_BL.device)[None]
        position_BL, real_BL = index_BL, None
        if attention_mask_BL is not None or past_real_B is not None:
            real_BL = torch.ones_like(ids_BL, dtype=torch.bool)
            if attention_mask_BL is not None:
                real_BL = attention_mask_BL.to(ids_BL.device).bool()
            position_BL = real_BL.long().cumsum(dim=1) - 1
            if past_real_B is not None:
                position_BL = position_BL + past_real_B[:, None]
            position_BL = position_BL.clamp(min=0)
        if branches_BL is not None:
            branches_BL = branches_BL.to(ids_BL.device)
            if real_BL is not None:
                branches_BL = branches_BL.masked_fill(~real_BL, -1)
            index_BL = _along_texts(index_BL, branches_BL)
            position_BL = _along_texts(position_BL, branches_BL)
        return Tokens(index_BL, stop, position_BL, documents_BL, real_BL, branches_BL)


def check_alike(ids_BL: Tensor, **said: Tensor | None) -> None:
    """Raises ValueError for what has another shape than the tokens that it is said of."""
    for name, given in said.items():
        if given is not None and given.shape != ids_BL.shape:
            raise ValueError(
                f"{name}: has shape {(*given.shape,)}; must be {(*ids_BL.shape,)}, as the tokens"
            )


def _along_texts(count_BL: Tensor, branch_BL: Tensor) -> Tensor:
    """From a count along whole rows that along each token's text: a continuation goes on from the context."""
    starts_BL = torch.ones_like(branch_BL, dtype=torch.bool)
    starts_BL[:, 1:] = branch_BL[:, 1:] != branch_BL[:, :-1]
    start_BL = torch.where(starts_BL, count_BL, 0).cummax(dim=1).values
    of_context_BL = branch_BL == 0
    context_B1 = torch.where(of_context_BL, count_BL + 1, 0).amax(dim=1, keepdim=True)
    return torch.where(of_context_BL, count_BL, count_BL - start_BL + context_B1)


@dataclass(frozen=True)
class Side:
    """One side of pairs of slots, queries or keys, in shapes that broadcast against the other side's."""

    token: Tensor
    """Place of the token in its text."""
    position: Tensor
    """Place of the token among the real ones of its text."""
    stage: Tensor
    document: Tensor | None
    """Number of the document; None where every row is one."""
    real: Tensor | None
    """False for padding; None where nothing is padded."""
    branch: Tensor | None
    """Number of the continuation, 0 for the context; None where no row branches."""
    stop: int
    """Tokens of a row; no place is higher."""
    last_stage: int
    """The highest stage of any slot on this side."""


@dataclass(frozen=True)
class Slots:
    """Which token and stage each slot belongs to, and what holds for that token."""

    token_BS: Tensor
    """Place of the token in its text; (1, S) where no row branches."""
    stop: int
    """Tokens of a row up to the last of these."""
    stage_S: Tensor
    position_BS: Tensor
    document_BS: Tensor | None = None
    real_BS: Tensor | None = None
    branch_BS: Tensor | None = None
    last_stage: int = 0
    """The highest stage of any slot."""

    @staticmethod
    def interleaved(tokens: Tokens, stages: int, first_stage: int = 0) -> Slots:
        """Slots of all `tokens` with stages first_stage .. first_stage + stages - 1, token-major."""

        def spread(values: Tensor | None) -> Any:
            return None if values is None else values.repeat_interleave(stages, dim=-1)

        stage_n = torch.arange(first_stage, first_stage + stages, device=tokens.index_BL.device)
        return Slots(
            spread(tokens.index_BL),
            tokens.stop,
            stage_n.repeat(tokens.length),
            spread(tokens.position_BL),
            spread(tokens.document_BL),
            spread(tokens.real_BL),
            spread(tokens.branch_BL),
            first_stage + stages - 1,
        )

    def to(self, device: torch.device) -> Slots:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def queries(self) -> Side:
        """As the first of a pair, (B or 1, Q, 1)."""
        return self._side(lambda values: values[:, :, None])

    def keys(self) -> Side:
        """As the second of a pair, (B or 1, 1, K)."""
        return self._side(lambda values: values[:, None])

    def at(self, row: Tensor, index: Tensor) -> Side:
        """The slot at `index` of batch row `row`, as scalars: what a mask of FlexAttention is asked about."""
        return self._side(lambda values: values[row, index] if len(values) > 1 else values.squeeze(0)[index])

    def _side(self, take: Callable[[Tensor], Tensor]) -> Side:
        def maybe(values: Tensor | None) -> Tensor | None:
            return None if values is None else take(values)

        return Side(
            token=take(self.token_BS),
            position=take(self.position_BS),
            stage=take(self.stage_S[None]),
            document=maybe(self.document_BS),
            real=maybe(self.real_BS),
            branch=maybe(self.branch_BS),
            stop=self.stop,
            last_stage=self.last_stage,
        )

    def part(self, start: int, end: int, stop: int) -> Slots:
        """The slots at indices start .. end - 1; their last token is the row's `stop`-th."""

        def cut(values: Tensor | None) -> Any:
            return None if values is None else values[..., start:end]

        return Slots(
            cut(self.token_BS),
            stop,
            cut(self.stage_S),
            cut(self.position_BS),
            cut(self.document_BS),
            cut(self.real_BS),
            cut(self.branch_BS),
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
            join(self.token_BS, more.token_BS),
            max(self.stop, more.stop),
            torch.cat([self.stage_S, more.stage_S]),
            join(self.position_BS, more.position_BS),
            join(self.document_BS, more.document_BS),
            join(self.real_BS, more.real_BS),
            join(self.branch_BS, more.branch_BS),
            max(self.last_stage, more.last_stage),
        )
