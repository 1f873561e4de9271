"""Parameters and gradients that may be divided among ranks, as DTensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a parameter; where that is sharded, this rank's share of it."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = whole.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))
    else:
        parameter.copy_(whole)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """The norm of all gradients together, which are scaled down if it is more than `limit`."""
    groups = defaultdict[Any, list[nn.Parameter]](list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[_layout(parameter.grad)].append(parameter)
    norms = [_norm([p.grad for p in group if p.grad is not None]) for group in groups.values()]
    total = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for group in groups.values():
        torch.nn.utils.clip_grads_with_norm_(group, limit, total)
    return float(total)


def _layout(gradient: Tensor) -> Any:
    """Gradients that are spread alike can be computed with together."""
    return (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
