"""The linear layer of backbones: torch's, by the kernel that is fastest on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lattice import one_row, onednn


class Linear(nn.Linear):
    """torch.nn.Linear. On a CPU results may differ from its by roundings, and gradients be differentiable no
    further."""

    def forward(self, input: Tensor) -> Tensor:
        # The cheapest questions first: on a GPU decoding waits for Python.
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        if input.numel() == input.shape[-1] and not torch.is_grad_enabled():
            return one_row.linear(input, self.weight, self.bias)
        if onednn.serves(input, self.weight):
            return onednn.linear(input, self.weight, self.bias)
        return super().forward(input)
