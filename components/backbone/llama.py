"""Llama (Touvron et al., arXiv 2302.13971; grouped-query attention as in arXiv 2307.09288).

Module and parameter names are Hugging Face's, so that a checkpoint needs no translation.
Shapes: B batch, S slots, D hidden, H query heads, G key/value heads, E head size; any dimensions may stand
before them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lattice.components.backbone._options import (
    hf_options,
    hf_rope,
    multiple,
    norm_eps,
    positive,
    rotary_base,
    warn_of_dropout,
)
from lattice.cost import wide
from lattice.decoder import Block, Decoder, Projected, Rotary, rotary_tables
from lattice.linear import Linear
from lattice.protocols import Backbone, LayerCost, Shape
from lattice.registry import register
from lattice.transient import transient


@register("backbone", "llama")
@dataclass(frozen=True, kw_only=True)
class Llama(Backbone):
    """Llama decoder: RMSNorm, SwiGLU, grouped-query attention. Options as in Hugging Face's LlamaConfig."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    """Heads of keys and values; as many as of queries if not given."""
    intermediate_size: int = 2048
    vocab_size: int = 50304
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    """Size of a head; hidden_size / num_attention_heads if not given."""

    def __post_init__(self) -> None:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        positive({name: getattr(self, name) for name in (*names, "vocab_size", "max_position_embeddings")})
        positive({"num_key_value_heads": self.key_value_heads, "head_dim": self.head_size})
        multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.key_value_heads)
        if self.head_dim is None:
            multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        rotary_base("rope_theta", self.rope_theta)
        norm_eps("rms_norm_eps", self.rms_norm_eps)
        if self.head_size % 2:
            raise ValueError(f"head_dim = {self.head_size}: must be even, for the rotary embedding")

    @property
    def key_value_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def shape(self) -> Shape:
        return Shape(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            vocab_size=self.vocab_size,
            context=self.max_position_embeddings,
            splits=math.gcd(self.num_attention_heads, self.key_value_heads, self.intermediate_size),
        )

    @property
    def layer_cost(self) -> LayerCost:
        queries = self.num_attention_heads * self.head_size
        shared = self.key_value_heads * self.head_size
        size, inner = self.hidden_size, self.intermediate_size
        return LayerCost(
            project=2 * size * (queries + 2 * shared),
            local=0,
            finish=2 * queries * size + 6 * size * inner,
            attention=4 * queries,
            cached=2 * shared,
            wide=(
                wide((size, queries), (size, shared), (size, shared)),
                0,
                wide((queries, size), (size, inner), (size, inner)),
            ),
            last=2 * size * inner,
        )

    def build(self) -> Decoder:
        return LlamaDecoder(self)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{name: getattr(self, name) for name in Llama.__dataclass_fields__},
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "attention_dropout": 0.0,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Llama | None:
        if config.get("model_type") != "llama":
            return None
        warn_of_dropout(config, ("attention_dropout",))
        known = hf_options(config, cls.__dataclass_fields__)
        return cls(**known | {"rope_theta": hf_rope(config)["theta"]})


class Attention(nn.Module):
    """The projections around attention."""

    def __init__(self, options: Llama) -> None:
        super().__init__()
        size, bias, self.head_size = options.hidden_size, options.attention_bias, options.head_size
        queries = options.num_attention_heads * self.head_size
        keys = options.key_value_heads * self.head_size
        self.q_proj = Linear(size, queries, bias=bias)
        self.k_proj = Linear(size, keys, bias=bias)
        self.v_proj = Linear(size, keys, bias=bias)
        self.o_proj = Linear(queries, size, bias=bias)

    def project(self, x_D: Tensor) -> Projected:
        def heads(linear: nn.Linear) -> Tensor:
            projected: Tensor = linear(x_D)
            return projected.view(*projected.shape[:-1], -1, self.head_size)

        return Projected(heads(self.q_proj), heads(self.k_proj), heads(self.v_proj))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shazeer, arXiv 2002.05202."""
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, options: Llama) -> None:
        super().__init__()
        size, inner, bias = options.hidden_size, options.intermediate_size, options.mlp_bias
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)

    def forward(self, x_D: Tensor) -> Tensor:
        out: Tensor = transient(swiglu, self.gate_proj(x_D), self.up_proj(x_D), into=self.down_proj)
        return out


class Layer(Block):
    def __init__(self, options: Llama) -> None:
        super().__init__()
        self.self_attn = Attention(options)
        self.mlp = MLP(options)
        self.input_layernorm = nn.RMSNorm(options.hidden_size, eps=options.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(options.hidden_size, eps=options.rms_norm_eps)

    def project(self, x_D: Tensor) -> Projected:
        return transient(self.input_layernorm, x_D, into=self.self_attn.project)

    def local(self, x_D: Tensor) -> Tensor:
        return x_D

    def finish(self, attended_E: Tensor, local_D: Tensor) -> Tensor:
        x_D = local_D + self.self_attn.o_proj(attended_E)
        out_D: Tensor = x_D + transient(self.post_attention_layernorm, x_D, into=self.mlp)
        return out_D


class Layers(nn.Module):
    """The part that Hugging Face calls `model`: everything but the head."""

    def __init__(self, options: Llama) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(options.vocab_size, options.hidden_size)
        self.layers = nn.ModuleList(Layer(options) for _ in range(options.num_hidden_layers))
        self.norm = nn.RMSNorm(options.hidden_size, eps=options.rms_norm_eps)


class LlamaDecoder(Decoder):
    """Llama taken apart; see lattice.decoder.Decoder."""

    def __init__(self, options: Llama) -> None:
        super().__init__()
        self.options = options
        self.model = Layers(options)
        self.lm_head = Linear(options.hidden_size, options.vocab_size, bias=False)
        if options.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    def rotary(self, position_BS: Tensor, dtype: torch.dtype) -> Rotary:
        return rotary_tables(position_BS, self.options.head_size, self.options.rope_theta, dtype)

    def residual_projections(self) -> list[nn.Linear]:
        layers = [layer for layer in self.model.layers if isinstance(layer, Layer)]
        return [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
