"""Activations computed again in the backward pass: of layers, of whole passes, or the cheap ones alone.

Chen et al., arXiv 1604.06174. Gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lattice.protocols import ActivationCheckpoint
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

    @property
    def again(self) -> int:
        return 1

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

    @property
    def again(self) -> int:
        return 1 + self.blocks

    def block(self, call: Callable[..., T]) -> Callable[..., T]:
        return recomputed(call) if self.blocks else call

    def whole_pass(self, call: Callable[..., T]) -> Callable[..., T]:
        return recomputed(call)


MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in MATRIX_PRODUCTS:
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
    """Keeps the results of matrix products and attention; computes again what is cheap between them.

    For backbones that let lattice.transient do that this saves nothing: GPT-NeoX and Llama keep less with
    `none`. It is for those of one's own that do not."""

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
