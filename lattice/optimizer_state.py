"""What an optimizer keeps of each parameter from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def check_state(kind: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError for what no checkpoint could hold, once a step has been taken."""
    for name, parameter in parameters.items():
        for key, value in _leaves(optimizer.state.get(parameter, {})):
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"optimizer '{kind}': its state of {name} has '{key}', a {type(value).__name__}; must be "
                    "a tensor, which a checkpoint can hold"
                )


def _leaves(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key, value
