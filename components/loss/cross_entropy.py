"""Cross entropy of the next token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lattice.protocols import Loss
from lattice.registry import register


@register("loss", "cross_entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross entropy in float32, chunk by chunk: the logits of all targets are never held at once."""

    chunk_tokens: int = 1024
    """Targets whose logits are held at once, in float32 with their gradients."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {self.chunk_tokens}: must be at least 1")

    def total(self, hidden_ND: Tensor, head: nn.Module, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        count = (targets_N != -100).sum()
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and (hidden_ND.requires_grad or parameters):
            total: Tensor = _WithGradients.apply(  # type: ignore[no-untyped-call]
                head, targets_N, self.chunk_tokens, hidden_ND, *parameters
            )
        else:
            total = hidden_ND.new_zeros((), dtype=torch.float32)
            for chunk in _chunks(len(targets_N), self.chunk_tokens):
                total = total + _chunk_loss(head, hidden_ND[chunk], targets_N[chunk])
        return total, count


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _chunk_loss(head: nn.Module, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_CD).float(), targets_C, reduction="sum")


class _WithGradients(torch.autograd.Function):
    """The gradients of a chunk are computed while its logits are there, so that no logits are kept or
    computed again; they are scaled when the gradient of the loss is known. Those of the head's parameters
    are summed over the chunks in the parameters' precision."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets_N: Tensor, size: int, hidden_ND: Tensor, *parameters: Tensor
    ) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND)
        gradients: list[Tensor] = []
        for chunk in _chunks(len(targets_N), size):
            hidden_CD = hidden_ND[chunk].detach().requires_grad_()
            with torch.enable_grad():
                loss = _chunk_loss(head, hidden_CD, targets_N[chunk])
            total += loss.detach()
            grad_ND[chunk], *of_chunk = torch.autograd.grad(loss, [hidden_CD, *parameters])
            if not gradients:
                gradients = of_chunk
                continue
            for gradient, more in zip(gradients, of_chunk, strict=True):
                gradient += more
        ctx.gradients = [grad_ND, *(gradients or [torch.zeros_like(parameter) for parameter in parameters])]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken before; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(one.mul_(grad) for one in gradients)
