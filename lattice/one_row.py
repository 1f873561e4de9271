"""One slot at a time, as decoding goes: on a CPU its time is that of reading weights, keys and values, and
what reads them fastest is not what multiplies many rows fastest.

`python benchmarks/decode_limit.py` shows by how much. Results differ by roundings alone.
Shapes: B batch, D features, H query heads, G key/value heads, S slots, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lattice.transient import product_dtype


@contextmanager
def fast_products(x_D: Tensor) -> Iterator[None]:
    """For linears of `x_D` (…, D). Of one row, on a CPU: torch's own bfloat16 product reads twice as fast as
    oneDNN's, which is the faster one from three rows on."""
    switch: Any = torch.backends.mkldnn
    if x_D.device.type != "cpu" or x_D.numel() != x_D.shape[-1] or not switch.enabled:
        yield
        return
    switch.enabled = False
    try:
        yield
    finally:
        switch.enabled = True


def attention(query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, **options: Any) -> Tensor:
    """Scaled dot-product attention. Of one query, on a CPU: torch's kernel for bfloat16 takes longer than
    casting everything to float32 and computing in that."""
    attend: Callable[..., Tensor] = partial(F.scaled_dot_product_attention, **options)
    one = query_BHSE.shape[2] == 1 and not torch.is_grad_enabled() and query_BHSE.device.type == "cpu"
    if not one or (dtype := product_dtype(query_BHSE)) != torch.bfloat16:
        return attend(query_BHSE, key_BGSE, value_BGSE)
    with torch.autocast("cpu", enabled=False):
        return attend(query_BHSE.float(), key_BGSE.float(), value_BGSE.float()).to(dtype)


def lay_out(model: nn.Module) -> None:
    """Puts the weights of linears into the order of memory that is read fastest for one row, in place: column
    after column, of those in float32 on a CPU with no fewer outputs than inputs. Names, shapes, values stay.

    For a model that decodes one sequence at a time: with many rows a step gets slower, not faster. Under
    autocast weights are read as what it casts them to, so call this within it.
    """
    for linear in model.modules():
        if not isinstance(linear, nn.Linear) or linear.in_features > linear.out_features:
            continue
        weight = linear.weight
        if weight.device.type == "cpu" and product_dtype(weight) == torch.float32:
            weight.data = weight.data.t().contiguous().t()
