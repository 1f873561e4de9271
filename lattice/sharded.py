"""Parameters and gradients that may be divided among ranks, as DTensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T", bound=Tensor)


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a parameter; where that is sharded, this rank's share of it."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = whole.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))
    else:
        parameter.copy_(whole)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it, detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def alike(tensors: Iterable[T]) -> list[list[T]]:
    """Those that are divided alike together, in their order: operations on lists of tensors mix no others."""
    groups = defaultdict[Any, list[T]](list)
    for tensor in tensors:
        layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        groups[layout].append(tensor)
    return list(groups.values())


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """The norm of all gradients together, which are scaled down if it is more than `limit`."""
    groups = alike(parameter for parameter in parameters if parameter.grad is not None)
    norms = [_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    total = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, total)
    return float(total)


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
