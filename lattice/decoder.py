"""What every backbone module offers: embedding, layers, final norm, head; and the attention they share.

Shapes: B batch, L tokens, n stages, S = L·n slots, D hidden, H query heads, G key/value heads, E head size,
V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lattice.cache import LayerCache
from lattice.one_row import attention
from lattice.protocols import Initialization, Shape
from lattice.sharded import put


class Rotary(NamedTuple):
    """Cosines and sines of the rotary position embedding, (B or 1, S, 1, R) for R rotated dimensions. Those
    at i and i + R/2 turn together; the sines of the first half are negative."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Blocks:
    """A mask by blocks of slots."""

    mask: Any
    """FlexAttention's BlockMask."""
    attention: Callable[..., Tensor]
    """FlexAttention, compiled where its device has a kernel."""
    pairs: Callable[[torch.device], Callable[..., Tensor]]
    """Of a device: which pairs of slots within a block are seen, read from tensors there."""

    def to(self, device: torch.device) -> Blocks:
        if self.mask.kv_indices.device == device:
            return self
        moved = self.mask.to(device)
        moved.mask_mod = self.pairs(device)  # torch leaves what it reads where it was
        return replace(self, mask=moved)


@dataclass(frozen=True)
class AttentionMask:
    """Causal order over slots that are all queries and all keys, or what each query sees, or blocks, or none
    at all."""

    causal: bool
    allowed: Tensor | None = None
    """(B or 1, 1, Q, K), True where a query may look; or what is added to scores, in the precision of the
    queries: 0 there, minus infinity elsewhere."""
    blocks: Blocks | None = None

    def to(self, device: torch.device | str | int) -> AttentionMask:
        """For layers on several devices: accelerate moves a layer's inputs to it, those that have `to`."""
        device = torch.device(device)
        allowed = None if self.allowed is None else self.allowed.to(device)
        return replace(self, allowed=allowed, blocks=None if self.blocks is None else self.blocks.to(device))


class Projected(NamedTuple):
    """Queries (…, H, E), keys and values (…, G, E) of slots, before rotation."""

    query: Tensor
    key: Tensor
    value: Tensor


class Alone(NamedTuple):
    """What a layer makes of each slot alone, whatever the others are."""

    projected: Projected
    local: Tensor
    """(…, D)"""


class Block(nn.Module, ABC):
    """One layer, taken apart where slots meet: `project` and `local` read a slot alone, attention mixes, and
    `finish` adds up."""

    @abstractmethod
    def project(self, x_D: Tensor) -> Projected: ...

    @abstractmethod
    def local(self, x_D: Tensor) -> Tensor:
        """(…, D) -> (…, D): what goes past attention; the input, and with a parallel residual the MLP."""

    @abstractmethod
    def finish(self, attended_E: Tensor, local_D: Tensor) -> Tensor:
        """From what attention gave (…, H·E) and what went past it (…, D) to the layer's output (…, D)."""

    @property
    def recordable(self) -> bool:
        """Whether it meets other slots in `attend` alone, which asks the mask: then keys may be given to it
        that the mask leaves out (lattice.replay). A `forward` of its own may look at how many there are."""
        return type(self).forward is Block.forward

    def alone(self, x_D: Tensor) -> Alone:
        projected = self.project(x_D)
        # Called past `forward`, where accelerate would move the input to a layer that lies elsewhere.
        return Alone(projected, self.local(x_D.to(projected.query.device)))

    def forward(
        self,
        x_BLnD: Tensor,
        rotary: Rotary,
        mask: AttentionMask,
        cache: LayerCache | None,
        read: slice = slice(None),
        given: Alone | None = None,
    ) -> Tensor:
        """The stages `read` of the output, (B, L, r, D); of the others only keys and values are computed.

        `given` is the part of the stages before those in `x_BLnD`, if it is known already; all is read then.
        """
        length, fresh = x_BLnD.shape[1:3]
        if given is None:
            projected = self.project(x_BLnD)
        elif fresh:
            pairs = zip(given.projected, self.project(x_BLnD), strict=True)
            projected = Projected(*(torch.cat(pair, dim=2) for pair in pairs))
        else:
            projected = given.projected
        query_BSHE, key_BSGE, value_BSGE = (heads.flatten(1, 2) for heads in projected)
        key_BGSE, value_BGSE = store(key_BSGE, value_BSGE, rotary, cache)
        if given is None and not range(fresh)[read]:
            return x_BLnD[:, :, read]
        attended_BSE = attend(query_BSHE, key_BGSE, value_BGSE, rotary, mask)
        batch, slots, size = attended_BSE.shape
        attended_BLrE = attended_BSE.view(batch, length, slots // length, size)[:, :, read]
        return self.finish(attended_BLrE, self._local(x_BLnD[:, :, read], given))

    def _local(self, x_BLrD: Tensor, given: Alone | None) -> Tensor:
        if given is None:
            return self.local(x_BLrD)
        if not x_BLrD.shape[2]:
            return given.local
        return torch.cat([given.local, self.local(x_BLrD)], dim=2)


class Decoder(nn.Module, ABC):
    """A decoder-only transformer taken apart, so that a recurrence can run the parts it needs."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding: ...

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The layers, each a `Block`."""

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

    def allocate(self, device: torch.device) -> None:
        """Gives parameters on the meta device memory on `device`; a tied weight stays one."""
        allocated: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.modules():
            for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
                if weight not in allocated:
                    empty = torch.empty_like(weight, device=device)
                    allocated[weight] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                setattr(module, name, allocated[weight])
        for name, buffer in self.named_buffers():
            if buffer.is_meta:
                raise ValueError(
                    f"{type(self).__name__}: buffer '{name}' is computed when the backbone is built, on the "
                    "meta device, where it has no values: compute it in the forward pass, as `rotary` does"
                )

    @torch.no_grad()
    def initialize(self, scheme: Initialization) -> None:
        """Draws every weight anew from the global generator of the CPU, in the order of the module tree:
        those of linears and embeddings as the scheme says; norms are 1, biases 0; any other module sets its
        own by `reset_parameters`. Raises ValueError for a parameter that nothing sets."""
        residual = {id(linear) for linear in self.residual_projections()}
        for name, module in self.named_modules():
            own = dict(module.named_parameters(recurse=False))
            weight, bias = own.pop("weight", None), own.pop("bias", None)
            drawn = isinstance(module, nn.Linear | nn.Embedding)
            if own or not (drawn or weight is None or weight.dim() == 1):
                self._reset(name, module, own or ["weight"])
                continue
            if weight is not None and drawn:
                std = scheme.residual_std if id(module) in residual else scheme.std
                put(weight, _drawn(weight, std, scheme.truncate))
            elif weight is not None:
                weight.fill_(1.0)
            if bias is not None:
                bias.zero_()

    def _reset(self, name: str, module: nn.Module, own: Iterable[str]) -> None:
        reset = getattr(module, "reset_parameters", None)
        if reset is None or isinstance(module, nn.Linear | nn.Embedding):  # theirs knows nothing of more
            first = ".".join(filter(None, (name, next(iter(own)))))
            raise ValueError(
                f"{type(self).__name__}: nothing sets parameter '{first}', which is that of no linear, "
                f"embedding or norm: give {type(module).__name__} a method `reset_parameters` that does"
            )
        reset()


def _drawn(like: Tensor, std: float, truncate: float | None) -> Tensor:
    whole = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    if truncate is None:
        return whole.normal_(0.0, std)
    return nn.init.trunc_normal_(whole, 0.0, std, -truncate * std, truncate * std)


def rotary_tables(position_BS: Tensor, dimensions: int, theta: float, dtype: torch.dtype) -> Rotary:
    """RoPE angles in the half-split layout of GPT-NeoX and Llama (Su et al., arXiv 2104.09864).

    Computed in float32 at least: bf16 cannot tell positions beyond 256 apart.
    """
    precise = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, dimensions, 2, device=position_BS.device, dtype=torch.int64).to(precise)
    frequency = 1.0 / theta ** (exponent / dimensions)
    angle = position_BS[:, :, None, None].to(precise) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return Rotary(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x_BSHE: Tensor, rotary: Rotary) -> Tensor:
    """Rotates the first R dimensions of each head; the others pass through. Keeps the tables alone for the
    backward pass, which is the inverse rotation."""
    size, whole = rotary.cos.shape[-1], x_BSHE.shape[-1]
    if size == whole:
        return _turned(x_BSHE, rotary)
    turning, rest = torch.split(x_BSHE, [size, whole - size], dim=-1)
    return torch.cat([_turned(turning, rotary), rest], dim=-1)


def _turned(x_BSHR: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = rotary
    return torch.addcmul(x_BSHR * cos, x_BSHR.roll(cos.shape[-1] // 2, -1), sin)


def store(
    key_BSGE: Tensor, value_BSGE: Tensor, rotary: Rotary, layer_cache: LayerCache | None
) -> tuple[Tensor, Tensor]:
    """Rotates the keys and puts them and the values in the cache; returns those of all slots."""
    key_BGSE, value_BGSE = rotate(key_BSGE, rotary).transpose(1, 2), value_BSGE.transpose(1, 2)
    return (key_BGSE, value_BGSE) if layer_cache is None else layer_cache.append(key_BGSE, value_BGSE)


def attend(
    query_BSHE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, rotary: Rotary, mask: AttentionMask
) -> Tensor:
    """Rotates the queries; scaled dot-product attention: (B, S, H·E)."""
    # The output lies in memory as the queries do: slot by slot, so that no copy makes it so.
    query_BHSE = rotate(query_BSHE, rotary).transpose(1, 2)
    # Only where it is so: in a graph for all sizes the comparison is a symbol, and torch wants a bool.
    sharing = {"enable_gqa": True} if query_BHSE.shape[1] != key_BGSE.shape[1] else {}
    if (blocks := mask.blocks) is not None:
        out_BHSE = blocks.attention(query_BHSE, key_BGSE, value_BGSE, block_mask=blocks.mask, **sharing)
    else:
        options = {"attn_mask": mask.allowed, "is_causal": mask.causal, **sharing}
        out_BHSE = attention(query_BHSE, key_BGSE, value_BGSE, **options)
    return out_BHSE.transpose(1, 2).flatten(2)


def check_decoder(decoder: Any, kind: str, shape: Shape) -> None:
    """Raises TypeError where what a backbone of this kind builds is no Decoder, ValueError where it is not of
    the shape that the backbone declares."""
    if not isinstance(decoder, Decoder):
        raise TypeError(
            f"backbone '{kind}': build() returns a {type(decoder).__name__}; must be a lattice Decoder "
            "(lattice.decoder)"
        )
    blocks = decoder.blocks
    if not isinstance(blocks, nn.ModuleList) or not all(isinstance(block, Block) for block in blocks):
        raise TypeError(
            f"backbone '{kind}': blocks is a {type(blocks).__name__} of "
            f"{', '.join(sorted({type(block).__name__ for block in blocks}))}; must be a ModuleList of "
            "lattice.decoder.Block"
        )
    table = shape.vocab_size, shape.hidden_size
    for what, found, declared in (
        ("layers", len(blocks), shape.num_layers),
        ("rows and columns of the embedding", tuple(decoder.embedding.weight.shape), table),
        ("rows and columns of the head", tuple(decoder.head.weight.shape), table),
    ):
        if found != declared:
            raise ValueError(f"backbone '{kind}': {found} {what}; its shape declares {declared}")
