"""Matrix products with one row, of which decoding one sequence is made: on a CPU their time is that of reading
the weights, and what reads them fastest is not what multiplies many rows fastest.

    python benchmarks/decode_limit.py

shows both. No number that is computed changes but for the order in which products are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lattice.transient import product_dtype


@contextmanager
def fast_products(x_D: Tensor) -> Iterator[None]:
    """For linears of `x_D` (…, D). Of one row, on a CPU: torch's own bfloat16 product reads twice as fast as
    oneDNN's, which is the faster one from three rows on."""
    switch = torch.backends.mkldnn
    if x_D.device.type != "cpu" or x_D.numel() != x_D.shape[-1] or not switch.enabled:
        yield
        return
    switch.enabled = False
    try:
        yield
    finally:
        switch.enabled = True


def lay_out(model: nn.Module) -> None:
    """Puts the weights of linears into the order of memory that is read fastest for one row, in place: those in
    float32 on a CPU with no fewer outputs than inputs column after column. Names, shapes and values stay.

    For a model that decodes one sequence at a time: with many rows a step gets slower, not faster. Under
    autocast weights are read as what it casts them to, so call this within it.
    """
    for linear in model.modules():
        if not isinstance(linear, nn.Linear) or linear.in_features > linear.out_features:
            continue
        weight = linear.weight
        if weight.device.type == "cpu" and product_dtype(weight) == torch.float32:
            weight.data = weight.data.t().contiguous().t()
