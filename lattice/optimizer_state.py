"""What an optimizer keeps of each parameter from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def check_state(kind: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError for what no checkpoint could hold, once a step has been taken."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"optimizer '{kind}': its state of {name} has '{key}', a {type(value).__name__}; must be "
                    "a tensor, which a checkpoint can hold"
                )
