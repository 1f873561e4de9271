"""What every backbone module offers: embedding, layers, final norm, head; and the attention they share.

Shapes: B batch, S slots, D hidden, H query heads, G key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lattice.cache import LayerCache
from lattice.protocols import Initialization


class Rotary(NamedTuple):
    """Cosines and sines of the rotary position embedding, (B or 1, 1, S, R) for R rotated dimensions."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Causal order over slots that are all queries and all keys, or booleans, or blocks, or none at all."""

    causal: bool
    allowed: Tensor | None = None
    """(B or 1, 1, Q, K), True where a query may look."""
    blocks: Any = None
    """FlexAttention's BlockMask."""


class Decoder(nn.Module, ABC):
    """A decoder-only transformer taken apart, so that a recurrence can run the parts it needs."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding: ...

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """Each is called as block(hidden_BSD, rotary, mask, cache) -> hidden_BSD."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module: ...

    @property
    @abstractmethod
    def head(self) -> nn.Linear: ...

    @abstractmethod
    def rotary(self, position_BS: Tensor, dtype: torch.dtype) -> Rotary: ...

    @abstractmethod
    def residual_projections(self) -> list[nn.Linear]:
        """The linears whose output is added to the residual stream."""

    @torch.no_grad()
    def initialize(self, scheme: Initialization) -> None:
        """Draws every weight anew from the global generator, in the order of the module tree."""
        residual = {id(linear) for linear in self.residual_projections()}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = scheme.residual_std if id(module) in residual else scheme.std
                if scheme.truncate is None:
                    module.weight.normal_(0.0, std)
                else:
                    cut = scheme.truncate * std
                    nn.init.trunc_normal_(module.weight, 0.0, std, -cut, cut)
            elif (weight := getattr(module, "weight", None)) is not None:
                weight.fill_(1.0)
            if (bias := getattr(module, "bias", None)) is not None:
                bias.zero_()


def rotary_tables(position_BS: Tensor, dimensions: int, theta: float, dtype: torch.dtype) -> Rotary:
    """RoPE angles in the half-split layout of GPT-NeoX and Llama (Su et al., arXiv 2104.09864).

    Computed in float32 at least: bf16 cannot tell positions beyond 256 apart.
    """
    precise = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, dimensions, 2, device=position_BS.device, dtype=torch.int64).to(precise)
    frequency = 1.0 / theta ** (exponent / dimensions)
    angle = position_BS[:, None, :, None].to(precise) * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return Rotary(angle.cos().to(dtype), angle.sin().to(dtype))


def rotate(x_BHSE: Tensor, rotary: Rotary) -> Tensor:
    """Rotates the first R dimensions of each head; the others pass through."""
    dimensions = rotary.cos.shape[-1]
    turned = x_BHSE[..., :dimensions]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * rotary.cos + torch.cat([-second, first], dim=-1) * rotary.sin
    if dimensions == x_BHSE.shape[-1]:
        return turned
    return torch.cat([turned, x_BHSE[..., dimensions:]], dim=-1)


def attend(
    query_BHSE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    rotary: Rotary,
    mask: AttentionMask,
    layer_cache: LayerCache | None,
) -> Tensor:
    """Rotary embedding, cache and scaled dot-product attention: (B, S, H·E)."""
    query_BHSE, key_BGSE = rotate(query_BHSE, rotary), rotate(key_BGSE, rotary)
    if layer_cache is not None:
        key_BGSE, value_BGSE = layer_cache.append(key_BGSE, value_BGSE)
    shared = query_BHSE.shape[1] != key_BGSE.shape[1]
    if mask.blocks is not None:
        flex = _flex_attention(query_BHSE.device.type)
        out_BHSE: Tensor = flex(query_BHSE, key_BGSE, value_BGSE, block_mask=mask.blocks, enable_gqa=shared)
    else:
        out_BHSE = F.scaled_dot_product_attention(
            query_BHSE,
            key_BGSE,
            value_BGSE,
            attn_mask=mask.allowed,
            is_causal=mask.causal,
            enable_gqa=shared,
        )
    return out_BHSE.transpose(1, 2).flatten(2)


@cache
def _flex_attention(device: str) -> Callable[..., Any]:
    """Compiled on a GPU, where it is a fused kernel; elsewhere the definition, without gradients."""
    from torch.nn.attention.flex_attention import flex_attention

    return cast("Callable[..., Any]", torch.compile(flex_attention) if device == "cuda" else flex_attention)
