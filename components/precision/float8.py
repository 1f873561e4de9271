"""Matrix products in float8, by torchao (https://github.com/pytorch/ao); weights stay in float32.

Inputs, weights and gradients of a converted linear are scaled by their largest absolute value, cast to
float8 and multiplied; results and everything else are bfloat16, by autocast (Micikevicius et al.,
arXiv 2209.05433). Weights are the same tensors under the same names, so that a checkpoint is one of any
other precision, and whoever loads it without this kind has plain linears.

A weight is cast anew in each pass and once more in its backward pass. torchao casts within the product
(`matmul_with_hp_or_float8_args`) and keeps nothing; a weight that is float8 already it takes as it is, but
its public way to have one is the all-gather of FSDP2 (`enable_fsdp_float8_all_gather`), for the recipe
`tensorwise` alone. Its earlier cache of cast weights was removed (float8_experimental#181).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lattice.components.precision.formats import BFloat16
from lattice.console import say
from lattice.model import LanguageModel
from lattice.protocols import Precision
from lattice.registry import register

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
MULTIPLE = 16
"""Of the dimensions of a float8 product (torch._scaled_mm)."""
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}
"""Least compute capability whose kernels a recipe has."""


@register("precision", "float8")
@dataclass(frozen=True, kw_only=True)
class Float8(Precision):
    """Large linears in float8, all else as bf16; for GPUs of compute capability 8.9 (9.0) and later."""

    recipe: Recipe = "rowwise"
    """torchao's. "rowwise": a scale for each row of a matrix, so that a token's input is rounded by itself
    alone; "rowwise_with_gw_hp": gradients of weights in bfloat16, most exact; "tensorwise": one scale for all
    rows, fastest, but a token's rounding depends on those after it and on the other rows of the batch."""
    min_features: int | None = None
    """Linears with both dimensions at least this large are converted; if not given, those that torchao's
    measurements on an H100 call large enough for the recipe."""
    emulate: bool = False
    """Round to float8 and multiply in float32, on any device: slow, to try a recipe out."""

    def __post_init__(self) -> None:
        if self.min_features is not None and self.min_features < 1:
            raise ValueError(f"min_features = {self.min_features}: must be at least 1, or left out")

    def apply(self, model: nn.Module) -> None:
        """Raises ValueError where torchao or the hardware is missing, or no linear can be converted."""
        self._check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        float8 = _torchao()
        config = float8.Float8LinearConfig.from_recipe_name(self.recipe)
        reasons = {name: self._reason(linear, model) for name, linear in _linears(model)}
        chosen = {name for name, reason in reasons.items() if reason is None}
        left = Counter(reason for reason in reasons.values() if reason is not None)
        said = ", ".join(f"{count} {reason}" for reason, count in left.most_common()) or "none"
        if not chosen:
            raise ValueError(
                f"precision.kind = 'float8': none of {len(reasons)} linears can be converted ({said}): lower "
                'precision.min_features, use a larger model, or precision.kind = "bf16"'
            )
        float8.convert_to_float8_training(
            model,
            module_filter_fn=lambda linear, name: name in chosen,
            config=dataclasses.replace(config, emulate=self.emulate),
        )
        if self.emulate:
            for name in chosen:
                model.get_submodule(name).register_forward_pre_hook(_as_autocast)
        if self.recipe != "rowwise_with_gw_hp":
            model.register_forward_pre_hook(_check_tokens)
        how = f"float8 ({self.recipe}{', emulated' if self.emulate else ''})"
        say(f"{how}: {len(chosen)} of {len(reasons)} linears; left in bfloat16: {said}")

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        self._check(device)
        return torch.autocast(device.type, dtype=torch.bfloat16)

    @property
    def weights(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def as_in_memory(self) -> Precision:
        # Inputs are kept in bfloat16 and cast again in the backward pass (torchao, issue 2262).
        return BFloat16()

    def _check(self, device: torch.device) -> None:
        if self.emulate:
            return
        major, minor = CAPABILITY[self.recipe]
        found = f"the device is '{device.type}'"
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability >= (major, minor):
                return
            name = torch.cuda.get_device_name(device)
            found = f"{name} has compute capability {capability[0]}.{capability[1]}"
        raise ValueError(
            f"precision.emulate = false: float8 with recipe '{self.recipe}' needs a CUDA device of compute "
            f"capability {major}.{minor} or later, {found}: set precision.emulate = true to try it (slow), "
            'or precision.kind = "bf16"'
        )

    def _reason(self, linear: nn.Linear, model: nn.Module) -> str | None:
        """Why a linear is not converted; None where it is."""
        if isinstance(model, LanguageModel) and linear is model.decoder.head:
            return "head"
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            return f"not multiples of {MULTIPLE}"
        if not self._large(linear.in_features, linear.out_features):
            return "too small"
        return None

    def _large(self, inputs: int, outputs: int) -> bool:
        """The thresholds are torchao's (`_auto_filter_for_recipe`, from its measurements on an H100); for
        rowwise_with_gw_hp it gives none, and those of rowwise are taken."""
        if self.min_features is not None:
            return min(inputs, outputs) >= self.min_features
        if self.recipe == "tensorwise":
            return inputs > 4096 or outputs > 1024
        return outputs > 2048 and inputs > 1024 and (outputs > 4096 or inputs > 2048)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _torchao() -> Any:
    """Imported by none who does not train in float8: it takes a second and prints on a CPU build."""
    try:
        return importlib.import_module("torchao.float8")
    except ImportError as error:
        raise ValueError(
            f"precision.kind = 'float8': needs torchao ({error}): pip install 'lattice[float8]'"
        ) from error


def _as_autocast(linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """torchao's linear looks at the autocast of GPUs alone; on a CPU its input is cast here."""
    (x,) = args
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return (x,)


def _check_tokens(model: LanguageModel, args: tuple[Tensor, ...]) -> None:
    """The tokens of a batch are the inner dimension of the product that gives a weight's gradient. Passes
    hold whole stages of all tokens, so that they hold a multiple of these."""
    ranks = 1 if model.split is None else model.split.size
    if torch.is_grad_enabled() and args and args[0].numel() // ranks % MULTIPLE:
        size = " x ".join(map(str, args[0].shape)) + (f" / {ranks}" if ranks > 1 else "")
        raise ValueError(
            f"a batch of {size} tokens: float8 trains with multiples of {MULTIPLE} tokens: change "
            'run.micro_batch or run.sequence_tokens, or set precision.recipe = "rowwise_with_gw_hp"'
        )
