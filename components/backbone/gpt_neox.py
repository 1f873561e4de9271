"""GPT-NeoX (Black et al., arXiv 2204.06745), the architecture of Pythia (arXiv 2304.01373).

Module and parameter names are Hugging Face's, so that a checkpoint needs no translation.
Shapes: B batch, S slots, D hidden, H heads, E head size; any dimensions may stand before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@register("backbone", "gpt_neox")
@dataclass(frozen=True, kw_only=True)
class GPTNeoX(Backbone):
    """GPT-NeoX decoder (Pythia). Options carry the names of Hugging Face's GPTNeoXConfig."""

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    vocab_size: int = 50304
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    use_parallel_residual: bool = True
    attention_bias: bool = True
    layer_norm_eps: float = 1e-5
    hidden_act: Activation = "gelu"
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        positive({name: getattr(self, name) for name in (*names, "vocab_size", "max_position_embeddings")})
        multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        rotary_base("rotary_emb_base", self.rotary_emb_base)
        norm_eps("layer_norm_eps", self.layer_norm_eps)
        if not 0 < self.rotary_pct <= 1:
            raise ValueError(f"rotary_pct = {self.rotary_pct}: must be in (0, 1]")
        if self.rotary_dimensions < 2 or self.rotary_dimensions % 2:
            raise ValueError(
                f"rotary_pct = {self.rotary_pct}: rotates {self.rotary_dimensions} of the "
                f"{self.head_size} dimensions of a head; must be an even number of at least 2"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dimensions(self) -> int:
        return int(self.head_size * self.rotary_pct)

    @property
    def shape(self) -> Shape:
        return Shape(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            vocab_size=self.vocab_size,
            context=self.max_position_embeddings,
            splits=math.gcd(self.num_attention_heads, self.intermediate_size),
        )

    @property
    def layer_cost(self) -> LayerCost:
        size, inner, parallel = self.hidden_size, self.intermediate_size, self.use_parallel_residual
        mlp = 4 * size * inner
        # The last product of all, dense or dense_4h_to_h, is not looked for among the wide ones.
        wide_mlp = wide((size, inner), *([(inner, size)] if parallel else []))
        return LayerCost(
            project=6 * size * size,
            local=mlp if parallel else 0,
            finish=2 * size * size + (0 if parallel else mlp),
            attention=4 * size,
            cached=2 * size,
            wide=(6 * size * size, wide_mlp if parallel else 0, 0 if parallel else wide_mlp),
            last=2 * size * size if parallel else mlp // 2,
        )

    def build(self) -> Decoder:
        return GPTNeoXDecoder(self)

    def to_hf(self) -> dict[str, Any]:
        names = GPTNeoX.__dataclass_fields__
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            **{name: getattr(self, name) for name in names},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rotary_emb_base,
                "partial_rotary_factor": self.rotary_pct,
            },
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> GPTNeoX | None:
        if config.get("model_type") != "gpt_neox":
            return None
        warn_of_dropout(config, ("attention_dropout", "hidden_dropout"))
        rope = hf_rope(config)
        known = hf_options(config, cls.__dataclass_fields__)
        known |= {"rotary_emb_base": rope["theta"], "rotary_pct": rope["fraction"] or 0.25}
        return cls(**known)


class Attention(nn.Module):
    """The projections around attention."""

    def __init__(self, options: GPTNeoX) -> None:
        super().__init__()
        size = options.hidden_size
        self.head_size = options.head_size
        self.query_key_value = Linear(size, 3 * size, bias=options.attention_bias)
        self.dense = Linear(size, size, bias=options.attention_bias)

    def project(self, x_D: Tensor) -> Projected:
        # The fused projection is head-major: (H, [query, key, value], E), so that a rank may have some heads.
        qkv: Tensor = self.query_key_value(x_D)
        query, key, value = qkv.view(*qkv.shape[:-1], -1, 3 * self.head_size).chunk(3, dim=-1)
        # The backward pass needs queries and keys as they are after rotation; a view of the values would keep
        # them as they were before, too.
        return Projected(query, key, value.clone())


class MLP(nn.Module):
    def __init__(self, options: GPTNeoX) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(options.hidden_size, options.intermediate_size)
        self.dense_4h_to_h = Linear(options.intermediate_size, options.hidden_size)
        self.activation = ACTIVATIONS[options.hidden_act]

    def forward(self, x_D: Tensor) -> Tensor:
        out: Tensor = transient(self.activation, self.dense_h_to_4h(x_D), into=self.dense_4h_to_h)
        return out


class Layer(Block):
    def __init__(self, options: GPTNeoX) -> None:
        super().__init__()
        self.parallel = options.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(options.hidden_size, eps=options.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(options.hidden_size, eps=options.layer_norm_eps)
        self.attention = Attention(options)
        self.mlp = MLP(options)

    def project(self, x_D: Tensor) -> Projected:
        return transient(self.input_layernorm, x_D, into=self.attention.project)

    def local(self, x_D: Tensor) -> Tensor:
        return self._with_mlp(x_D) if self.parallel else x_D

    def finish(self, attended_E: Tensor, local_D: Tensor) -> Tensor:
        summed_D: Tensor = self.attention.dense(attended_E) + local_D
        return summed_D if self.parallel else self._with_mlp(summed_D)

    def _with_mlp(self, x_D: Tensor) -> Tensor:
        out_D: Tensor = transient(self.post_attention_layernorm, x_D, into=self.mlp) + x_D
        return out_D


class Layers(nn.Module):
    """The part that Hugging Face calls `gpt_neox`: everything but the head."""

    def __init__(self, options: GPTNeoX) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(options.vocab_size, options.hidden_size)
        self.layers = nn.ModuleList(Layer(options) for _ in range(options.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(options.hidden_size, eps=options.layer_norm_eps)


class GPTNeoXDecoder(Decoder):
    """GPT-NeoX taken apart; see lattice.decoder.Decoder."""

    def __init__(self, options: GPTNeoX) -> None:
        super().__init__()
        self.options = options
        self.gpt_neox = Layers(options)
        self.embed_out = Linear(options.hidden_size, options.vocab_size, bias=False)
        if options.tie_word_embeddings:
            self.embed_out.weight = self.gpt_neox.embed_in.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.gpt_neox.embed_in

    @property
    def blocks(self) -> nn.ModuleList:
        return self.gpt_neox.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.gpt_neox.final_layer_norm

    @property
    def head(self) -> nn.Linear:
        return self.embed_out

    def rotary(self, position_BS: Tensor, dtype: torch.dtype) -> Rotary:
        options = self.options
        return rotary_tables(position_BS, options.rotary_dimensions, options.rotary_emb_base, dtype)

    def residual_projections(self) -> list[nn.Linear]:
        layers = [layer for layer in self.gpt_neox.layers if isinstance(layer, Layer)]
        return [linear for layer in layers for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h)]
