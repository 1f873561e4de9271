"""Activations computed again in the backward pass: of layers, of whole passes, or the wide ones of layers.

Chen et al., arXiv 1604.06174. Gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lattice import onednn
from lattice.protocols import ActivationCheckpoint, LayerCost
from lattice.registry import register

T = TypeVar("T")


def recomputed(call: Callable[..., T]) -> Callable[..., T]:
    """`call`, keeping nothing but its inputs. No layer draws random numbers, so none are restored."""
    if not torch.is_grad_enabled():
        return call
    return partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)


@register("activation_checkpoint", "block")
@dataclass(frozen=True, kw_only=True)
class RecomputeBlock(ActivationCheckpoint):
    """Keeps the input of every layer of every pass; the rest of a layer is computed twice."""

    def again(self, cost: LayerCost) -> list[LayerCost]:
        return [cost.to_last]

    def block(self, call: Callable[..., T]) -> Callable[..., T]:
        return recomputed(call)

    def whole_pass(self, call: Callable[..., T]) -> Callable[..., T]:
        return call


@register("activation_checkpoint", "pass")
@dataclass(frozen=True, kw_only=True)
class RecomputePass(ActivationCheckpoint):
    """Keeps the input of every pass alone: memory nearly flat in the number of iterations."""

    blocks: bool = False
    """While a pass is computed again, keep the inputs of its layers alone: a layer is computed thrice."""

    def again(self, cost: LayerCost) -> list[LayerCost]:
        return [cost, cost.to_last] if self.blocks else [cost]

    def block(self, call: Callable[..., T]) -> Callable[..., T]:
        return recomputed(call) if self.blocks else call

    def whole_pass(self, call: Callable[..., T]) -> Callable[..., T]:
        return recomputed(call)


ATEN = torch.ops.aten
ATTENTION = {
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
MATRICES = {
    ATEN.mm.default: (0, -1),
    ATEN.bmm.default: (0, -1),
    ATEN._scaled_mm.default: (0, -1),
    ATEN.addmm.default: (1, -1),
    getattr(onednn.PRODUCT, "default", None): (0, 0),
}
"""Matrix products: which argument is the first factor, and which dimension of the next one has outputs."""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operation in MATRICES:
        first, dimension = MATRICES[operation]
        inputs, outputs = args[first].shape[-1], args[first + 1].shape[dimension]
        if outputs <= inputs:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _without_cast_cache(call: Callable[..., T]) -> Callable[..., T]:
    """Autocast casts a weight once and then remembers it, until the backward pass has to cast it again: the
    operations that selective checkpointing counts would differ. Here every call casts."""

    def casting(*args: Any) -> T:
        enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return call(*args)
        finally:
            torch.set_autocast_cache_enabled(enabled)

    return casting


@register("activation_checkpoint", "selective")
@dataclass(frozen=True, kw_only=True)
class RecomputeSelective(ActivationCheckpoint):
    """Keeps the results of attention and of matrix products that are not wider than what goes in; computes
    wide products again, such as that into an MLP, and all that is cheap."""

    def again(self, cost: LayerCost) -> list[LayerCost]:
        return [cost.wide_alone]

    def block(self, call: Callable[..., T]) -> Callable[..., T]:
        if not torch.is_grad_enabled():
            return call
        return partial(
            checkpoint,
            _without_cast_cache(call),
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, _policy),
        )

    def whole_pass(self, call: Callable[..., T]) -> Callable[..., T]:
        return call
