"""The narrow handle through which a recurrence sees the backbone during one forward.

Shapes: B batch, L tokens, n stages a token, S = L·n slots, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lattice.attention_mask import attention_mask
from lattice.cache import KVCache, LayerCache, Segment
from lattice.decoder import Alone, AttentionMask, Block, Decoder, Rotary
from lattice.layers import ALL, Layers
from lattice.protocols import ActivationCheckpoint, Mask
from lattice.replay import OneToken
from lattice.slots import Slots, Tokens
from lattice.split import Split
from lattice.transient import product_dtype


class Fixed:
    """Slots (B, L, n, D) that are the input of several passes, unchanged. What the first layer makes of each
    of them alone does not change either, and is computed once."""

    def __init__(self, slots_BLnD: Tensor, checkpointing: ActivationCheckpoint) -> None:
        self.slots_BLnD = slots_BLnD
        self._checkpointing = checkpointing
        self._alone: dict[tuple[int, bool], Alone] = {}

    def alone(self, block: Block) -> Alone:
        # Computed anew for the passes with gradients, where those before had none.
        key = (id(block), torch.is_grad_enabled())
        if key not in self._alone:
            call = self._checkpointing.whole_pass(self._checkpointing.block(block.alone))
            self._alone[key] = call(self.slots_BLnD)
        return self._alone[key]


class Stack:
    """Embedding, layers, norm and head of one backbone, over the tokens of one batch.

    Masks and rotary tables are built once for each layout and used by every pass. What comes out lies where
    what goes in does, though layers and head may lie on other devices: a recurrence meets one device.
    """

    def __init__(
        self,
        decoder: Decoder,
        mask: Mask,
        checkpointing: ActivationCheckpoint,
        tokens: Tokens,
        *,
        positions: int = 1,
        split: Split | None = None,
        whole: Stack | None = None,
    ) -> None:
        """`positions`: ids of a token, one for all its slots or one for each. `whole`: the stack of which
        this one is a part."""
        self._whole = whole
        self._positions = positions
        self._decoder = decoder
        self._mask = mask
        self._checkpointing = checkpointing
        self._split = split
        self._all = tokens
        self._tokens = tokens if self._split is None else tokens.part(self._split.part(tokens.length))
        self._masks: dict[Segment, AttentionMask] = {}
        # Those of a cache go when it goes: the next one may get its place in memory, and so its id.
        self._cached: WeakKeyDictionary[KVCache, dict[tuple[Segment, int], AttentionMask]]
        self._cached = WeakKeyDictionary()
        self._rotary: dict[tuple[int, int], Rotary] = {}
        self.passes = 0
        """How often `run` was called, of a whole stack on its parts too."""

    @property
    def num_layers(self) -> int:
        return len(self._decoder.blocks)

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Unscaled token embeddings (B, L, D)."""
        embedded: Tensor = self._decoder.embedding(ids_BL)
        return embedded

    @property
    def table_VD(self) -> Tensor:
        """The embedding table."""
        return self._decoder.embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, over states that went through the final norm: (…, D) -> (…, V)."""
        logits: Tensor = self._decoder.head(hidden)
        return logits.to(hidden.device)

    @property
    def real_BL(self) -> Tensor | None:
        """False for padding; None where nothing is padded."""
        return self._tokens.real_BL

    @property
    def document_BL(self) -> Tensor | None:
        """Document numbers, in decoding those of the new tokens; None where every row is one document."""
        return self._tokens.document_BL

    @property
    def position_BL(self) -> Tensor:
        """How many tokens of its row, none of them padding, come before each; (1, L) where all rows agree."""
        return self._tokens.position_BL

    def part(self, tokens: slice) -> Stack:
        """The same layers over some consecutive tokens, (B, l): what is computed token by token or chunk by
        chunk, in training as well, finds those before them in a `cache()`, which must hold them.

        Raises ValueError for a slice of no tokens or not of consecutive ones, and where ranks share a
        sequence, since each has a part of it already.
        """
        at = range(self._tokens.length)[tokens]
        if self._split is not None:
            raise ValueError(
                "stack.part: parallel.kind = 'context' gives each rank a part of every sequence already; "
                "must be another kind"
            )
        if len(at) < 1 or at.step != 1:
            raise ValueError(
                f"stack.part({tokens}): must be consecutive tokens, at least one of the {self._tokens.length}"
            )
        return Stack(
            self._decoder,
            self._mask,
            self._checkpointing,
            self._tokens.part(tokens),
            positions=self._positions,
            whole=self._whole or self,
        )

    def cache(self) -> KVCache:
        """An empty cache, through which gradients flow where they are enabled."""
        return KVCache(self.num_layers, gradients=torch.is_grad_enabled())

    def mine(self, values_BL: Tensor) -> Tensor:
        """Of the tokens of a batch those of this rank, where several share a sequence."""
        return values_BL if self._split is None else values_BL[:, self._split.part(values_BL.shape[1])]

    def row_norms(self, norm_B: Tensor) -> Tensor:
        """Norms of whole rows, from those of what this rank has of them."""
        return norm_B if self._split is None else self._split.norm(norm_B)

    def segment(self, stages: int, first_stage: int = 0) -> Segment:
        """What a pass over these stages writes to a cache."""
        return Segment(self._all.first, self._all.stop, first_stage, stages)

    def fixed(self, slots_BLnD: Tensor) -> Fixed:
        """For slots that go into several passes unchanged, such as the tokens before their thoughts."""
        return Fixed(slots_BLnD, self._checkpointing)

    def run(
        self,
        *slots: Tensor | Fixed,
        read: slice = ALL,
        first_stage: int = 0,
        start: int = 0,
        stop: int | None = None,
        norm: bool = True,
        cache: KVCache | None = None,
    ) -> Tensor:
        """One pass of layers [start, stop) over interleaved slots; with `norm`, then the final norm.

        `slots`, each (B, L, n, D), hold the stages from first_stage on, in this order. Returned are the
        stages that `read` cuts out of them, (B, L, r, D): the last layer computes no others, but all keys and
        values. With a `cache` the slots also attend to what it holds, as far as the mask lets them, and their
        keys and values are written to it, in place of those that the same slots had there. Raises ValueError
        for slots of other tokens and for layers that are not there.
        """
        self._check(slots, read, start, stop)
        (self._whole or self).passes += 1
        stages = sum(_tensor(part).shape[2] for part in slots)
        segment = self.segment(stages, first_stage)
        mask = self._attention_mask(segment, cache)
        blocks = cast("Sequence[Block]", self._decoder.blocks[start:stop])
        fixed, slots_BLnD = self._fixed_and_others(slots, len(blocks))
        rotary = self._rotary_for(segment, slots_BLnD)
        given = None if fixed is None else fixed.alone(blocks[0])
        layers = Layers(blocks, self._decoder.final_norm if norm else None)
        if cache is not None and fixed is None and self._split is None and len(blocks):
            one = OneToken(slots_BLnD, rotary, mask, read)
            room = partial(cache.room, segment, start, stop)
            if (replayed := cache.replays.run(layers, one, room)) is not None:
                return replayed
        caches = self._layers(len(blocks), segment, cache, start, stop)

        def whole_pass(x_BLnD: Tensor) -> Tensor:
            called = self._checkpointing.block
            return layers(x_BLnD, rotary, mask, caches, read=read, given=given, called=called)

        hidden_BLrD: Tensor = self._checkpointing.whole_pass(whole_pass)(slots_BLnD).to(slots_BLnD.device)
        return hidden_BLrD if len(blocks) else hidden_BLrD[:, :, read]

    def _check(self, slots: Sequence[Tensor | Fixed], read: slice, start: int, stop: int | None) -> None:
        if not isinstance(read, slice):
            raise TypeError(f"read = {read!r}: must be a slice of the stages, such as slice(-1, None)")
        for shape in (tuple(_tensor(part).shape) for part in slots):
            if len(shape) != 4 or shape[1] != self._tokens.length:
                raise ValueError(
                    f"stack.run: slots have shape {shape}; must be (B, {self._tokens.length}, n, D), n "
                    "stages of each token; `stack.part` runs some of the tokens"
                )
        if not 0 <= start <= (self.num_layers if stop is None else stop) <= self.num_layers:
            raise ValueError(
                f"stack.run: start = {start}, stop = {stop}: must be 0 <= start <= stop <= "
                f"{self.num_layers}, the number of layers"
            )

    def _fixed_and_others(self, slots: Sequence[Tensor | Fixed], layers: int) -> tuple[Fixed | None, Tensor]:
        """The fixed slots in front, if there is a layer that profits, and all others interleaved."""
        fixed, first = None, slots[0]
        if isinstance(first, Fixed) and layers > 1:
            empty_BL0D = first.slots_BLnD[:, :, :0]
            fixed, slots = first, slots[1:] or (empty_BL0D,)
        tensors = [_tensor(part) for part in slots]
        return fixed, tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=2)

    def _attention_mask(self, segment: Segment, cache: KVCache | None) -> AttentionMask:
        """Built once for each layout of queries and keys."""
        shared = self._split is not None  # then the queries are not the last of the keys
        if cache is None:
            if segment not in self._masks:
                queries, keys = self._queries_and_keys(segment)
                self._masks[segment] = attention_mask(self._mask, queries, keys, newest=not shared)
            return self._masks[segment]
        newest = not cache.holds(segment)
        masks = self._cached.setdefault(cache, {})
        if newest or (segment, cache.segments) not in masks:
            queries, written = self._queries_and_keys(segment)
            keys = cache.place(segment, written)
            newest = newest and not shared
            masks[segment, cache.segments] = attention_mask(self._mask, queries, keys, newest=newest)
        return masks[segment, cache.segments]

    def _queries_and_keys(self, segment: Segment) -> tuple[Slots, Slots]:
        """Slots of this rank, and those that all ranks of the sequence write."""
        keys = Slots.interleaved(self._all, segment.stages, segment.first_stage)
        if self._split is None:
            return keys, keys
        return Slots.interleaved(self._tokens, segment.stages, segment.first_stage), keys

    def _layers(
        self, count: int, segment: Segment, cache: KVCache | None, start: int, stop: int | None
    ) -> Sequence[LayerCache | None]:
        """Where each layer's keys and values are written, and found."""
        layers: Sequence[LayerCache | None] = [None] * count
        if cache is not None:
            layers = cache.layers(segment, start, stop)
        return layers if self._split is None else [self._split.of_all(layer) for layer in layers]

    def _rotary_for(self, segment: Segment, like: Tensor) -> Rotary:
        key = segment.stages, segment.first_stage if self._positions > 1 else 0
        if key not in self._rotary:
            slots = Slots.interleaved(self._tokens, *key)
            position_BS = slots.position_BS * self._positions + slots.stage_S % self._positions
            self._rotary[key] = self._decoder.rotary(position_BS, product_dtype(like))
        return self._rotary[key]


def _tensor(part: Tensor | Fixed) -> Tensor:
    return part.slots_BLnD if isinstance(part, Fixed) else part
