"""The narrow handle through which a recurrence sees the backbone during one forward.

Shapes: B batch, L tokens, n stages a token, S = L·n slots, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lattice.cache import KVCache
from lattice.decoder import AttentionMask, Decoder, Rotary
from lattice.protocols import ActivationCheckpoint, Mask
from lattice.slots import Slots, Tokens


class Stack:
    """Embedding, layers, norm and head of one backbone, over the tokens of one batch.

    Masks and rotary tables are built once for each number of stages and used by every pass.
    """

    def __init__(
        self, decoder: Decoder, mask: Mask, checkpointing: ActivationCheckpoint, tokens: Tokens
    ) -> None:
        self._decoder = decoder
        self._mask = mask
        self._checkpointing = checkpointing
        self._tokens = tokens
        self._layouts: dict[tuple[int, int], tuple[Slots, AttentionMask]] = {}
        self._rotary: dict[tuple[int, int], Rotary] = {}

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
        return logits

    def run(
        self,
        slots_BLnD: Tensor,
        *,
        first_stage: int = 0,
        start: int = 0,
        stop: int | None = None,
        norm: bool = True,
        cache: KVCache | None = None,
    ) -> Tensor:
        """One pass of layers [start, stop) over the interleaved slots; with `norm`, then the final norm.

        The stages given are first_stage .. first_stage + n - 1. With a `cache` the slots also attend to
        what it holds, and their own keys and values are added to it.
        """
        batch, length, stages, size = slots_BLnD.shape
        slots, mask = self._layout(stages, first_stage, cache)
        rotary = self._rotary_for(stages, first_stage, slots, slots_BLnD)
        blocks = self._decoder.blocks[start:stop]
        caches = [None] * len(blocks) if cache is None else cache.layers[start:stop]

        def whole_pass(hidden_BSD: Tensor) -> Tensor:
            for block, layer_cache in zip(blocks, caches, strict=True):
                call = self._checkpointing.block(block) if layer_cache is None else block
                hidden_BSD = call(hidden_BSD, rotary, mask, layer_cache)
            return self._final_norm(hidden_BSD) if norm else hidden_BSD

        call = self._checkpointing.whole_pass(whole_pass) if cache is None else whole_pass
        return call(slots_BLnD.flatten(1, 2)).view(batch, length, stages, size)

    def _final_norm(self, hidden_BSD: Tensor) -> Tensor:
        normed: Tensor = self._decoder.final_norm(hidden_BSD)
        return normed

    def _layout(self, stages: int, first_stage: int, cache: KVCache | None) -> tuple[Slots, AttentionMask]:
        key = (stages, first_stage)
        if cache is not None:
            slots = Slots.interleaved(self._tokens, stages, first_stage)
            return slots, self._attention_mask(slots, cache.extend(slots))
        if key not in self._layouts:
            slots = Slots.interleaved(self._tokens, stages, first_stage)
            self._layouts[key] = slots, self._attention_mask(slots, slots)
        return self._layouts[key]

    def _attention_mask(self, queries: Slots, keys: Slots) -> AttentionMask:
        allowed = self._mask.allowed(queries, keys)
        if allowed is None:
            if len(queries.token_S) == len(keys.token_S):
                return AttentionMask(causal=True)
            if len(queries.token_S) == 1:
                return AttentionMask(causal=False)
            allowed = queries.before_or_at(keys)[None]
        return AttentionMask(causal=False, allowed=allowed[:, None])

    def _rotary_for(self, stages: int, first_stage: int, slots: Slots, like: Tensor) -> Rotary:
        key = (stages, first_stage)
        if key not in self._rotary:
            device = like.device.type
            autocast = device != "meta" and torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else like.dtype
            self._rotary[key] = self._decoder.rotary(slots.position_BS, dtype)
        return self._rotary[key]
