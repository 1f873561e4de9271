"""Values that ranks send each other, as JSON over the CPU.

torch.distributed has collectives for objects, but they unpickle: what ranks pass on of a file that somebody
else wrote must not be able to run code.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks of a gloo group, by rank. Tuples arrive as lists, keys as strings."""
    message = _encoded(value)
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(message)]), group=group)
    padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
    padded[: len(message)] = message
    messages = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(messages, padded, group=group)
    return [_decoded(one[: int(length)]) for one, length in zip(messages, lengths, strict=True)]


def broadcast(value: Any, group: ProcessGroup | None = None) -> Any:
    """The value of rank 0, on all ranks."""
    message = _encoded(value if dist.get_rank() == 0 else None)
    length = torch.tensor([len(message)])
    dist.broadcast(length, 0, group=group)
    if dist.get_rank() != 0:
        message = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(message, 0, group=group)
    return _decoded(message)


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(message: Tensor) -> Any:
    return json.loads(bytes(message.numpy()))
