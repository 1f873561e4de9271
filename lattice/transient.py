"""Values that are cheap to compute, such as what comes out of a norm or of an activation, are not kept.

A linear layer keeps its input for its backward pass: of a GPT-NeoX layer six numbers for each of the hidden
size, of fifteen in all. But what that input was computed from is kept too, so that it can be computed again
when it is needed. Gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

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
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return into(function(*inputs))
    parameters = dict(function.named_parameters()) if isinstance(function, nn.Module) else {}
    value: Tensor = _Value.apply(  # type: ignore[no-untyped-call]
        function, tuple(parameters), *inputs, *parameters.values()
    )
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
    """function(*inputs), keeping inputs and parameters.

    What needs the value in the backward pass comes before this one's own: the value is computed again when it
    is first asked for, with a graph, and this backward pass goes through that."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.names, ctx.computed = function, names, None
        device, ctx.dtype = tensors[0].device.type, product_dtype(tensors[0])
        ctx.autocast = nullcontext
        if device != "meta":  # which knows no autocast
            enabled = torch.is_autocast_enabled(device)
            ctx.autocast = partial(torch.autocast, device, ctx.dtype, enabled, cache_enabled=False)
        value = function(*tensors[: len(tensors) - len(names)])
        return value.to(ctx.dtype)

    @staticmethod
    def again(ctx: Any) -> tuple[list[Tensor], Tensor]:
        """Inputs and parameters as leaves of a new graph, and the value."""
        if ctx.computed is None:
            saved = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
            leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in saved]
            with torch.enable_grad(), ctx.autocast():
                ctx.computed = leaves, _called_with(ctx.function, ctx.names, leaves).to(ctx.dtype)
        computed: tuple[list[Tensor], Tensor] = ctx.computed
        return computed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves, value = _Value.again(ctx)
        ctx.computed = None
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(value, asked, grad))
        return None, None, *(next(gradients) if leaf.requires_grad else None for leaf in leaves)


def _called_with(function: Callable[..., Tensor], names: tuple[str, ...], tensors: list[Tensor]) -> Tensor:
    """A module with the parameters that it had: by now a sharded one may have put others in their place."""
    if not names:
        return function(*tensors)
    inputs = tensors[: -len(names)]
    parameters = dict(zip(names, tensors[-len(names) :], strict=True))
    called: Tensor = functional_call(cast("nn.Module", function), parameters, tuple(inputs))
    return called
