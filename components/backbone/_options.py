"""Checks and Hugging Face settings that the backbones share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any


def positive(options: Mapping[str, int]) -> None:
    """Raises ValueError for the first option that is not at least 1."""
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


def rotary_base(name: str, value: float) -> None:
    """Raises ValueError for a base of the rotary frequencies that has no powers."""
    if not value > 0:
        raise ValueError(f"{name} = {value}: must be greater than 0")


def norm_eps(name: str, value: float) -> None:
    """Raises ValueError for what a mean of squares must not be added to."""
    if not value >= 0:
        raise ValueError(f"{name} = {value}: must be at least 0")


def multiple(name: str, value: int, of: str, divisor: int) -> None:
    """Raises ValueError unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise ValueError(f"{name} = {value}: must be a multiple of {of} = {divisor}")


def hf_options(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of a backbone's options that Hugging Face's configuration gives, under the same names.

    Raises ValueError for attention that is not causal, and where the number of heads is missing: not every
    weight's shape depends on it, and the defaults of Hugging Face are not ours.
    """
    if not config.get("is_causal", True):
        raise ValueError(f"is_causal = {config['is_causal']}: only causal attention is implemented")
    if config.get("num_attention_heads") is None:
        raise ValueError("num_attention_heads: missing")
    return {name: config[name] for name in names if name in config}


def hf_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Theta and rotated fraction, from either of the places Hugging Face has kept them.

    Raises ValueError for scaled rotary embeddings, which are not implemented.
    """
    nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type = '{kind}': only 'default' is implemented")
    theta = nested.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10000.0)))
    fraction = nested.get("partial_rotary_factor", config.get("rotary_pct"))
    return {"theta": float(theta), "fraction": fraction}


def warn_of_dropout(config: dict[str, Any], names: tuple[str, ...]) -> None:
    """Dropout is not implemented: it changes training, not the function a checkpoint computes."""
    for name in names:
        if config.get(name):
            warnings.warn(
                f"config.json: {name} = {config[name]} is not applied: there is no dropout here", stacklevel=3
            )
