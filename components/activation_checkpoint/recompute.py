"""Activations computed again in the backward pass, a layer or a whole pass at a time.

Chen et al., arXiv 1604.06174. Gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lattice.protocols import ActivationCheckpoint
from lattice.registry import register


def recomputed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call`, keeping nothing but its inputs. No layer draws random numbers, so none are restored."""
    if not torch.is_grad_enabled():
        return call
    return partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)


@register("activation_checkpoint", "block")
@dataclass(frozen=True, kw_only=True)
class RecomputeBlock(ActivationCheckpoint):
    """Keeps the input of every layer of every pass; the rest of a layer is computed twice."""

    def block(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return recomputed(call)

    def whole_pass(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return call


@register("activation_checkpoint", "pass")
@dataclass(frozen=True, kw_only=True)
class RecomputePass(ActivationCheckpoint):
    """Keeps the input of every pass alone: memory nearly flat in the number of iterations."""

    def block(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return call

    def whole_pass(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return recomputed(call)
