"""Hugging Face directories: `config.json` and safetensors, in and out.

Parameter names are Hugging Face's own, so that weights pass through unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lattice import registry
from lattice.assemble import build_model
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.protocols import Backbone
from lattice.recipe import load_recipe

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def from_pretrained(
    folder: str | Path,
    recurrence: Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A model of ours with the weights of a Hugging Face directory.

    `recurrence` is a recipe's `[recurrence]` table, `none` if not given; `overrides` holds further tables;
    `dtype` is that of the parameters, whatever the file holds: training keeps float32 and computes in the
    recipe's precision. Raises FileNotFoundError for a missing file and ValueError for an architecture or
    setting that no backbone implements, or for weights that do not fit.
    """
    folder = Path(folder)
    backbone = read_backbone(folder)
    tables = {"backbone": to_table(backbone), "recurrence": dict(recurrence or {"kind": "none"})}
    recipe = load_recipe({**tables, **(overrides or {})})
    model = build_model(recipe, device="meta")
    if isinstance(model.unroll, nn.Module):  # parameters of its own, which no file gives
        model = build_model(recipe)
    weights = read_weights(folder)
    _fit(model, weights, folder)
    tied = model.decoder.head.weight is model.decoder.embedding.weight
    model.decoder.load_state_dict(weights, assign=True, strict=False)
    if tied:  # the file may hold the shared weight twice, or under the embedding's name alone
        model.decoder.head.weight = model.decoder.embedding.weight
    return model.to(dtype).requires_grad_(True)


def read_backbone(folder: Path) -> Backbone:
    """The backbone that a directory's `config.json` describes."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a directory with config.json and {WEIGHTS}, as "
            "`save_pretrained` of transformers writes it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no valid JSON: {error.msg}") from error
    known = registry.kinds("backbone")
    for cls in known.values():
        try:
            if (backbone := cls.from_hf(config)) is not None:  # type: ignore[attr-defined]
                found: Backbone = load_recipe({"backbone": to_table(backbone)}).component("backbone")
                return found
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path}: model_type = {config.get('model_type')!r}: must be one of {', '.join(known)}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, from one file or from the shards that its index names."""
    names = [WEIGHTS]
    if (index := folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{index}: no valid index of shards: {error}") from error
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist")
        try:
            weights |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: no valid safetensors file: {error}") from error
    return weights


def _fit(model: LanguageModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError where names or shapes differ; drops buffers that older checkpoints carry."""
    expected = model.decoder.state_dict()
    parameters = dict(model.decoder.named_parameters())  # a tied head is listed once
    for name in [
        name for name in weights if name.endswith(("rotary_emb.inv_freq", ".attention.bias", ".masked_bias"))
    ]:
        del weights[name]
    problems = [f"{name} is missing" for name in parameters if name not in weights]
    problems += [f"{name} has no place in this architecture" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, must be {tuple(expected[name].shape)}"
        for name in weights
        if name in expected and weights[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder}: weights do not fit config.json: {'; '.join(problems[:5])}{more}")


def save_pretrained(model: LanguageModel, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
    """Writes `config.json` and safetensors, sharded where they are larger than `max_shard_size`.

    The recurrence is not part of a Hugging Face architecture: its table is written to `config.json` under
    `lattice_recurrence`, and transformers runs the plain model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.components["backbone"].to_hf()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config |= {"dtype": dtype, "torch_dtype": dtype, "lattice_recurrence": to_table(model.recurrence)}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # A tied head is the embedding's parameter and listed once, under the name that readers look for.
    weights = {name: value.detach().cpu() for name, value in model.decoder.named_parameters()}
    with torch.no_grad():
        save_torch_state_dict(weights, str(folder), max_shard_size=max_shard_size, safe_serialization=True)
