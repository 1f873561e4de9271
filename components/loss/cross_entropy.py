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

    def total(
        self, hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, weights_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        count = (targets_N != -100).sum()
        of_targets = [hidden_ND] if weights_N is None else [hidden_ND, weights_N.float()]
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        learning = parameters or any(tensor.requires_grad for tensor in of_targets)
        if torch.is_grad_enabled() and learning:
            total: Tensor = _WithGradients.apply(  # type: ignore[no-untyped-call]
                head, targets_N, self.chunk_tokens, len(of_targets), *of_targets, *parameters
            )
        else:
            total = hidden_ND.new_zeros((), dtype=torch.float32)
            for chunk in _chunks(len(targets_N), self.chunk_tokens):
                total = total + _chunk_loss(head, targets_N[chunk], *(one[chunk] for one in of_targets))
        return total, count


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _chunk_loss(
    head: nn.Module, targets_C: Tensor, hidden_CD: Tensor, weights_C: Tensor | None = None
) -> Tensor:
    if weights_C is None:
        return F.cross_entropy(head(hidden_CD).float(), targets_C, reduction="sum")
    losses_C = F.cross_entropy(head(hidden_CD).float(), targets_C, reduction="none")
    return (weights_C.masked_fill(targets_C == -100, 0) * losses_C).sum()


class _WithGradients(torch.autograd.Function):
    """The gradients of a chunk are computed while its logits are there, so that no logits are kept or
    computed again; they are scaled when the gradient of the loss is known. Those of the head's parameters
    are summed over the chunks in the parameters' precision."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets_N: Tensor, size: int, rows: int, *tensors: Tensor
    ) -> Tensor:
        """The first `rows` of the tensors have a row for each target; the others are parameters."""
        of_targets, parameters = tensors[:rows], tensors[rows:]
        total = of_targets[0].new_zeros((), dtype=torch.float32)
        of_rows = [torch.empty_like(tensor) for tensor in of_targets]
        gradients: list[Tensor] = []
        for chunk in _chunks(len(targets_N), size):
            given = [tensor[chunk].detach().requires_grad_() for tensor in of_targets]
            with torch.enable_grad():
                loss = _chunk_loss(head, targets_N[chunk], *given)
            total += loss.detach()
            found = torch.autograd.grad(loss, [*given, *parameters])
            for gradient, part in zip(of_rows, found[:rows], strict=True):
                gradient[chunk] = part
            if not gradients:
                gradients = list(found[rows:])
                continue
            for gradient, more in zip(gradients, found[rows:], strict=True):
                gradient += more
        ctx.gradients = [*of_rows, *(gradients or [torch.zeros_like(parameter) for parameter in parameters])]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken before; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, None, *(one.mul_(grad) for one in gradients)
