"""AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lattice.protocols import Optimizer
from lattice.registry import register
from lattice.sharded import alike

_FUSED_ON = {"cuda", "cpu"}


@register("optimizer", "adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101), fused where there is one.

    Matrices decay, and so do embeddings; norms and biases do not.

    This is the division of GPT-NeoX, hence of Pythia (`get_params_for_weight_decay_optimization` in its
    megatron/model/utils.py: all but norm layers and biases decay). Here it goes by the number of dimensions:
    a parameter of fewer than two is a norm's or a bias.
    """

    lr: float = 1e-3
    """Peak learning rate, multiplied by the schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How much of the mean gradient, and of the mean of its square, a step keeps."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    weight_decay: float = 0.1
    """Multiplied by the learning rate of the step."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""

    def __post_init__(self) -> None:
        for option in ("lr", "eps"):
            if not 0 < getattr(self, option) < float("inf"):
                raise ValueError(f"{option} = {getattr(self, option)}: must be greater than 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}: must be two numbers, each at least 0 and less than 1")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay = {self.weight_decay}: must be 0 or more")
        if not self.grad_clip >= 0:
            raise ValueError(f"grad_clip = {self.grad_clip}: must be greater than 0, or 0 for no clipping")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Parameter groups, always in this order: those that decay, those that do not; one group of each, or
        one for each way in which they are divided among ranks. Frozen parameters are left out, shared ones
        occur once."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decaying = [parameter for parameter in trained if parameter.ndim >= 2]
        others = [parameter for parameter in trained if parameter.ndim < 2]
        groups = [
            *({"params": group, "weight_decay": self.weight_decay} for group in alike(decaying)),
            *({"params": group, "weight_decay": 0.0} for group in alike(others)),
        ]
        # One kernel for the whole update; on CPU its result does not vary from run to run either.
        fused = {parameter.device.type for parameter in trained} <= _FUSED_ON
        return torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=fused,
            foreach=not fused,
        )
