"""From a mask component to what attention takes: causal order, booleans, or blocks for FlexAttention.

Causal order over (token, stage), padding, that a slot sees itself, and that continuations of one context do
not see each other hold under every mask. They are added here, so that no kind can forget them.

Shapes: B batch, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lattice.decoder import AttentionMask, Blocks
from lattice.graphs import allow_graphs, stance
from lattice.protocols import Mask, kind_of
from lattice.slots import Side, Slots

BLOCK = 128
"""Slots of a block; FlexAttention skips blocks of which no pair is seen."""

BLOCKS_FROM = 512
"""Queries from which on a GPU takes a block mask."""

PAIRS = 2**22
"""Pairs of slots that are looked at together to find the blocks, of all rows."""

DOCUMENTS = 4
"""In each row of a batch that is made up, to predict or to measure."""


def made_up_documents(mask: Mask, ids_BL: Tensor) -> Tensor | None:
    """Document numbers of a made-up batch, all documents of one length; None where the mask needs none."""
    if not mask.needs_documents:
        return None
    length = ids_BL.shape[1]
    return (torch.arange(length, device=ids_BL.device) * DOCUMENTS // length).expand_as(ids_BL).contiguous()


def allowed(mask: Mask, queries: Slots, keys: Slots) -> Tensor | None:
    """(B or 1, Q, K), True where a query may look; None where causal order over the slots says it all."""
    query, key = queries.queries(), keys.keys()
    further = mask.sees(query, key)
    if further is None and key.real is None and key.branch is None:
        return None
    if further is not None:
        _check(mask, further, queries, keys)
    return _composed(query, key, further)


def is_causal(mask: Mask, queries: Slots, keys: Slots) -> bool:
    """Whether causal order says it all, without a look at all pairs."""
    one, other = queries.part(0, 1, queries.stop), keys.part(0, 1, keys.stop)
    return allowed(mask, one, other) is None


def before_or_at(query: Side, key: Side) -> Tensor:
    """The causal order: True where a key's (token, stage) is not after the query's, in the query's text."""
    before = (key.token < query.token) | ((key.token == query.token) & (key.stage <= query.stage))
    if key.branch is None:
        return before
    return before & ((key.branch == 0) | (key.branch == query.branch))


def _composed(query: Side, key: Side, further: Tensor | None) -> Tensor:
    seen = before_or_at(query, key)
    if key.real is not None:
        seen = seen & key.real
    if further is not None:
        seen = seen & further
    # A slot of padding would otherwise see nothing, and its softmax would be no number.
    itself = (key.token == query.token) & (key.stage == query.stage)
    return seen | (itself if key.branch is None else itself & (key.branch == query.branch))


def _rows(queries: Slots, keys: Slots) -> int:
    """The batch size, or 1 where all rows are alike."""
    per_row = [
        values for side in (queries, keys) for values in (side.token_BS, side.document_BS, side.real_BS)
    ]
    return max(len(values) for values in per_row if values is not None)


def _check(mask: Mask, further: Tensor, queries: Slots, keys: Slots) -> None:
    size = _rows(queries, keys), len(queries.stage_S), len(keys.stage_S)
    if not isinstance(further, Tensor):
        raise ValueError(
            f"mask '{kind_of(mask)}': sees() gave {further!r}; must be None, or a tensor of booleans that "
            f"broadcasts to {size}: an attribute of a side that a batch lacks is None"
        )
    fits = further.dim() == 3 and all(a in (1, b) for a, b in zip(further.shape, size, strict=True))
    if further.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask '{kind_of(mask)}': sees() gave {further.dtype} of shape {tuple(further.shape)}; must be "
            f"booleans that broadcast to {size}"
        )


def _takes_blocks(queries: Slots) -> bool:
    return queries.stage_S.device.type == "cuda" and len(queries.stage_S) >= BLOCKS_FROM


def attention_mask(mask: Mask, queries: Slots, keys: Slots, *, newest: bool) -> AttentionMask:
    """`newest`: the queries are the last of the keys, in causal order, so that plain order needs no booleans.

    On a GPU a mask that is not plain becomes a block mask; elsewhere, and for few queries, booleans.
    """
    size = len(queries.stage_S), len(keys.stage_S)
    whole = newest and size[0] == size[1]
    if _takes_blocks(queries):
        plain = is_causal(mask, queries, keys)  # asked of every mask: it checks what sees() gives
        if not (whole and plain):
            return AttentionMask(causal=False, blocks=block_mask(mask, queries, keys))
    seen = allowed(mask, queries, keys)
    if seen is None:
        if whole:
            return AttentionMask(causal=True)
        if newest and size[0] == 1:
            return AttentionMask(causal=False)
        seen = before_or_at(queries.queries(), keys.keys())
    return AttentionMask(causal=False, allowed=seen[:, None])


def block_mask(mask: Mask, queries: Slots, keys: Slots) -> Blocks:
    """The same predicate by blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    allow_graphs()  # past torch's own limit FlexAttention goes on uncompiled, and holds all scores

    def pairs(device: torch.device) -> Callable[..., Tensor]:
        queries_there, keys_there = queries.to(device), keys.to(device)

        def mask_mod(row: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            query, key = queries_there.at(row, query_index), keys_there.at(row, key_index)
            return _composed(query, key, mask.sees(query, key))

        return mask_mod

    device = queries.stage_S.device
    seen_BQK = _seen_by_block(mask, queries, keys)
    whole_BQK = seen_BQK == BLOCK * BLOCK
    blocks = BlockMask.from_kv_blocks(
        *_listed((seen_BQK > 0) & ~whole_BQK),
        *_listed(whole_BQK),
        BLOCK_SIZE=BLOCK,
        mask_mod=pairs(device),
        seq_lengths=(len(queries.stage_S), len(keys.stage_S)),
    )
    return Blocks(blocks, _flex_attention(device.type), pairs)


def _seen_by_block(mask: Mask, queries: Slots, keys: Slots) -> Tensor:
    """(B or 1, blocks of queries, blocks of keys): how many of a block's pairs are seen.

    torch's create_block_mask is the same, but holds all pairs at once: gigabytes for long texts.
    """
    size = len(queries.stage_S), len(keys.stage_S)
    lines = max(1, PAIRS // (BLOCK * size[1] * _rows(queries, keys))) * BLOCK
    counts = []
    for start in range(0, size[0], lines):
        part = queries.part(start, start + lines, queries.stop)
        seen = allowed(mask, part, keys)
        if seen is None:
            seen = before_or_at(part.queries(), keys.keys())
        padded = F.pad(seen, (0, -size[1] % BLOCK, 0, -seen.shape[1] % BLOCK))
        rows, height, width = padded.shape
        counts.append(padded.view(rows, height // BLOCK, BLOCK, width // BLOCK, BLOCK).sum(dim=(2, 4)))
    return torch.cat(counts, dim=1)


def _listed(blocks_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: those first, then the others."""
    order = torch.argsort(blocks_BQK.int(), dim=-1, descending=True, stable=True)
    return blocks_BQK.sum(dim=-1, dtype=torch.int32)[:, None], order.int()[:, None]


@cache
def _flex_attention(device: str) -> Callable[..., Any]:
    """Compiled on a GPU, where it is a fused kernel; elsewhere the definition, without gradients."""
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cuda":
        return cast("Callable[..., Any]", flex_attention)
    return _always(torch.compile(flex_attention))


def _always(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Where all else runs as written, too (hardware.any_length)."""

    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(*arguments, **options)
        with stance("default"):
            return compiled(*arguments, **options)

    return call
