"""One slot at a time, as decoding goes: on a CPU its time is that of reading weights, keys and values, and
what reads them fastest is not what multiplies many rows fastest.

`python benchmarks/decode_limit.py` shows by how much. Results differ by roundings alone.
Shapes: B batch, D features, H query heads, G key/value heads, S slots, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lattice.transient import product_dtype


@contextmanager
def fast_products(x_D: Tensor) -> Iterator[None]:
    """For linears of `x_D` (…, D). Of one row, on a CPU: torch's own bfloat16 product reads twice as fast as
    oneDNN's, which is the faster one from three rows on; and float32 is computed in parts."""
    switch: Any = torch.backends.mkldnn
    if x_D.device.type != "cpu" or x_D.numel() != x_D.shape[-1] or not switch.enabled:
        yield
        return
    in_parts = product_dtype(x_D) == torch.float32 and not torch.is_grad_enabled()
    switch.enabled = False
    try:
        with _InParts() if in_parts else nullcontext():
            yield
    finally:
        switch.enabled = True


class _InParts(TorchFunctionMode):
    """Linears of one row as a batch of products, each with some of the outputs: MKL's batched product reads
    twice as fast as its matrix times vector, and on all threads, where that one has one."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and not kwargs and (product := _product_in_parts(*args)) is not None:
            return product
        return function(*args, **(kwargs or {}))


def _product_in_parts(x_D: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """None for what this is not for."""
    parts = math.gcd(len(weight), max(2, torch.get_num_threads()))
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous()
    single = product_dtype(x_D) == x_D.dtype == weight.dtype == torch.float32
    if parts == 1 or not plain or not single or x_D.numel() != x_D.shape[-1]:
        return None
    columns = x_D.reshape(1, -1).t().expand(parts, -1, 1)  # MKL takes other strides ten times slower
    product = torch.bmm(weight.view(parts, -1, weight.shape[1]), columns).view(*x_D.shape[:-1], -1)
    return product if bias is None else product + bias


def attention(query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, **options: Any) -> Tensor:
    """Scaled dot-product attention. Of one query, on a CPU: torch's kernel for bfloat16 takes longer than
    casting everything to float32 and computing in that."""
    attend: Callable[..., Tensor] = partial(F.scaled_dot_product_attention, **options)
    one = query_BHSE.shape[2] == 1 and not torch.is_grad_enabled() and query_BHSE.device.type == "cpu"
    if not one or (dtype := product_dtype(query_BHSE)) != torch.bfloat16:
        return attend(query_BHSE, key_BGSE, value_BGSE)
    with torch.autocast("cpu", enabled=False):
        return attend(query_BHSE.float(), key_BGSE.float(), value_BGSE.float()).to(dtype)
