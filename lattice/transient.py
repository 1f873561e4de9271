"""Values that are cheap to compute, such as what comes out of a norm or of an activation, are not kept.

A linear layer keeps its input for its backward pass: of a GPT-NeoX layer six numbers for each of the hidden
size, of fifteen in all. But what that input was computed from is kept too, so that it can be computed again
when it is needed. Gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")


def product_dtype(tensor: Tensor) -> torch.dtype:
    """In what precision a matrix product with `tensor` is computed: autocast's, or its own."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def transient(function: Callable[..., Tensor], *inputs: Tensor, into: Callable[[Tensor], T]) -> T:
    """into(function(*inputs)); for the backward pass of `into` the value between them is computed again.

    `function` must be a function of `inputs`, and of its parameters if it is a module, and cost little; the
    linears in `into` get the value in the precision in which they compute.
    """
    # What torch.compile keeps it decides itself.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return into(function(*inputs))
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    value: Tensor = _Value.apply(function, len(inputs), *inputs, *parameters)  # type: ignore[no-untyped-call]
    if value.grad_fn is None:
        return into(value)
    with _instead_of(value):
        return into(value)


def _instead_of(value: Tensor) -> saved_tensors_hooks:
    """In this context the graph keeps for `value` how to compute it. All else is kept as it would be outside:
    there it may be activation checkpointing's business."""
    node: Any = value.grad_fn
    storage = value.untyped_storage()._cdata
    # Of nested hooks torch calls the innermost alone; it has no public name for those around them.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack_outside, unpack_outside = outer or (_itself, _itself)

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.untyped_storage()._cdata != storage:
            return partial(unpack_outside, pack_outside(tensor))
        return partial(_view, node, tensor.size(), tensor.stride(), tensor.storage_offset())

    return saved_tensors_hooks(pack, _called)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _called(kept: Callable[[], Tensor]) -> Tensor:
    return kept()


def _view(node: Any, *layout: Any) -> Tensor:
    """Of a value that is computed again."""
    value: Tensor = _Value.again(node)[1]
    return value.detach().as_strided(*layout)


class _Value(torch.autograd.Function):
    """function(*inputs), keeping the inputs. What needs the value in the backward pass comes before this: the
    value is computed again when it is first asked for, with a graph, and its own backward pass uses that."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        inputs, ctx.parameters = tensors[:count], tensors[count:]
        ctx.save_for_backward(*inputs)
        ctx.computed = None
        device, dtype = inputs[0].device.type, product_dtype(inputs[0])
        enabled = device != "meta" and torch.is_autocast_enabled(device)
        ctx.autocast = partial(torch.autocast, device, dtype, enabled, cache_enabled=False)
        ctx.function = lambda *given: function(*given).to(dtype)
        value: Tensor = ctx.function(*inputs)
        return value

    @staticmethod
    def again(ctx: Any) -> tuple[list[Tensor], Tensor]:
        """The inputs as leaves of a new graph, and the value."""
        if ctx.computed is None:
            needed = ctx.needs_input_grad[2:]
            kept = zip(ctx.saved_tensors, needed, strict=False)
            inputs = [tensor.detach().requires_grad_(needs) for tensor, needs in kept]
            with torch.enable_grad(), ctx.autocast():
                ctx.computed = inputs, ctx.function(*inputs)
        computed: tuple[list[Tensor], Tensor] = ctx.computed
        return computed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, value = _Value.again(ctx)
        ctx.computed = None
        needed = zip((*inputs, *ctx.parameters), ctx.needs_input_grad[2:], strict=True)
        asked = [tensor for tensor, needs in needed if needs]
        gradients = iter(torch.autograd.grad(value, asked, grad))
        return None, None, *(next(gradients) if needs else None for needs in ctx.needs_input_grad[2:])
