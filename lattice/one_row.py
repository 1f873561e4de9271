"""One slot at a time, as decoding goes: on a CPU its time is that of reading weights, keys and values, and
what reads them fastest is not what multiplies many rows fastest.

`python benchmarks/decode_limit.py` shows by how much. Results differ by roundings alone.
Shapes: B batch, D features, H query heads, G key/value heads, S slots, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lattice.onednn import plain
from lattice.transient import product_dtype

_attend: Callable[..., Tensor] = F.scaled_dot_product_attention


def linear(x_D: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear of a single row on a CPU, without gradients."""
    if product_dtype(x_D) != torch.float32:
        return _without_onednn(x_D, weight, bias)
    product = _in_parts(x_D, weight, bias)
    return F.linear(x_D, weight, bias) if product is None else product


def _in_parts(x_D: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A batch of products in float32, each with some of the outputs: MKL's batched product reads twice as
    fast as its matrix times vector, and on all threads. None for what this is not for."""
    outputs, inputs = weight.shape
    parts = math.gcd(outputs, max(2, torch.get_num_threads()))
    if parts == 1 or not plain(weight) or not weight.is_contiguous():
        return None
    if not x_D.dtype == weight.dtype == torch.float32:
        return None
    # The same column for each part, in one call; MKL takes other strides ten times slower.
    columns = x_D.contiguous().as_strided((parts, inputs, 1), (0, 1, inputs))
    in_parts = weight.view(parts, -1, inputs)
    if bias is None:
        product = torch.bmm(in_parts, columns)
    else:
        product = torch.baddbmm(bias.view(parts, -1, 1), in_parts, columns)
    return product.view(*x_D.shape[:-1], outputs)


def _without_onednn(x_D: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own bfloat16 product reads twice as fast as oneDNN's, which is faster from three rows on."""
    switch: Any = torch.backends.mkldnn
    if not switch.enabled:
        return F.linear(x_D, weight, bias)
    switch.enabled = False
    try:
        return F.linear(x_D, weight, bias)
    finally:
        switch.enabled = True


def kept_dtype(like: Tensor) -> torch.dtype:
    """Of keys and values that are kept to decode with: on a CPU float32 for bfloat16. `attention` of one
    query is computed in that, and casting all of them for each takes longer than reading them."""
    return torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype


def attention(query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, **options: Any) -> Tensor:
    """Scaled dot-product attention, in the precision of the queries. Of one query, on a CPU: torch's kernel
    for bfloat16 takes longer than computing in float32."""
    one = query_BHSE.shape[2] == 1 and query_BHSE.device.type == "cpu" and not torch.is_grad_enabled()
    if not one or (dtype := product_dtype(query_BHSE)) != torch.bfloat16:
        like = query_BHSE.dtype
        return _attend(query_BHSE, key_BGSE.to(like), value_BGSE.to(like), **options)
    if (added := options.get("attn_mask")) is not None and added.is_floating_point():
        options["attn_mask"] = added.float()
    with torch.autocast("cpu", enabled=False):
        return _attend(query_BHSE.float(), key_BGSE.float(), value_BGSE.float(), **options).to(dtype)
