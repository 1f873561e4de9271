"""Linears in float32 by oneDNN, on CPUs where MKL, which torch takes for them, is slower.

On AMD's processors MKL multiplies no faster than AVX2 can. Where these compute with 512 bits at once (Zen 5)
oneDNN is twice as fast, forward and backward; `python benchmarks/linears.py` shows by how much here. Results
differ by roundings alone.
Shapes: I inputs, O outputs, N rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lattice import hardware
from lattice.transient import product_dtype

PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""Of x, weight, bias and an activation, here none. None where torch was built without oneDNN."""
SMALLEST = 2**21
"""Multiplications of a product for which it is called: below, the call takes longer than it saves."""
OUTPUTS = 4096
"""Of the gradient of a weight, computed at once."""


@cache
def faster() -> bool:
    """Whether oneDNN multiplies faster than MKL, by the kind of the processor: the kernels, and so the
    roundings, are the same in each run on a machine."""
    available = PRODUCT is not None and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return available and avx512 and hardware.vendor() == "AuthenticAMD"


def serves(x_I: Tensor, weight_OI: Tensor) -> bool:
    """Whether `linear` is for these, and pays."""
    return (
        x_I.dtype == weight_OI.dtype == product_dtype(x_I) == torch.float32
        and x_I.device.type == weight_OI.device.type == "cpu"
        and x_I.numel() * len(weight_OI) >= SMALLEST
        and plain(x_I)
        and plain(weight_OI)
        and weight_OI.is_contiguous()
        and bool(torch.backends.mkldnn.enabled)
        and faster()
    )


def linear(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """torch.nn.functional.linear of tensors that it `serves`; differentiable once. (…, I) -> (…, O)."""
    if not torch.is_grad_enabled():
        return _product(x_I, weight_OI, bias_O)
    kept_I: Tensor = _Kept.apply(x_I, weight_OI)  # type: ignore[no-untyped-call]
    out_O: Tensor = _Linear.apply(kept_I, weight_OI, bias_O, x_I.requires_grad)  # type: ignore[no-untyped-call]
    return out_O


def plain(tensor: Tensor) -> bool:
    """Not a sharded one, or one of a precision of its own."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor)


def _product(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The weight is contiguous, or transposed: other strides take ten to a hundred times as long."""
    out_O: Tensor = PRODUCT(x_I.contiguous(), weight_OI, bias_O, "none", [], "")
    return out_O


class _Kept(torch.autograd.Function):
    """x, keeping what the backward pass of a product needs before the product is computed, as torch's own
    does: activation checkpointing computes again until all is there that was kept, and no further."""

    @staticmethod
    def forward(ctx: Any, x_I: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_I, weight_OI)
        return x_I.view_as(x_I)

    @staticmethod
    def backward(ctx: Any, grad_I: Tensor) -> tuple[Tensor, None]:
        return grad_I, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None, learning: bool) -> Tensor:
        """`learning`: whether the gradient of x is asked for. That of what was kept is, whenever one is."""
        ctx.kept, ctx.learning = kept_I.grad_fn, learning
        return _product(kept_I, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_O: Tensor) -> tuple[Tensor | None, ...]:
        of_x = of_weight = None
        rows_NO = grad_O.reshape(-1, grad_O.shape[-1])
        if ctx.kept is not None:  # the bias is not learnt alone
            x_I, weight_OI = ctx.kept.saved_tensors
            of_x = _product(grad_O, weight_OI.t()) if ctx.learning else None
            if ctx.needs_input_grad[1]:
                of_weight = _gradient(rows_NO, x_I.reshape(-1, x_I.shape[-1]))
        return of_x, of_weight, rows_NO.sum(0) if ctx.needs_input_grad[2] else None, None


def _gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """Of the weight. The first factor has to be copied: for a head, in parts."""
    x_IN = x_NI.contiguous().t()
    if grad_NO.shape[1] <= OUTPUTS:
        return _product(grad_NO.t(), x_IN)
    gradient_OI = grad_NO.new_empty(grad_NO.shape[1], x_NI.shape[1])
    for first in range(0, len(gradient_OI), OUTPUTS):
        outputs = slice(first, first + OUTPUTS)
        gradient_OI[outputs] = _product(grad_NO[:, outputs].t(), x_IN)
    return gradient_OI
