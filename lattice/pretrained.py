"""Models from Hugging Face directories and back; `lattice.hf` holds the parts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lattice.build import build_model
from lattice.hf import scale
from lattice.hf.directory import describe, load_weights
from lattice.hf.write import write_model
from lattice.model import LanguageModel
from lattice.recipe import load_recipe


def from_pretrained(
    folder: str | Path,
    recurrence: Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    trust_imports: bool = False,
) -> LanguageModel:
    """A model of ours with the weights of a Hugging Face directory.

    `recurrence` is a recipe's `[recurrence]` table; if not given, the directory's own, which for a model of
    transformers is none. Where it scales embeddings by default otherwise than the weights were trained with,
    a warning says so: `embed_scale` keeps their scale. `overrides` holds further tables; `dtype` is that of
    the parameters, whatever the file holds: training keeps float32 and computes in the recipe's precision.
    What a recurrence has of its own and the directory lacks is newly drawn. `trust_imports` allows the
    directory's own code. Raises FileNotFoundError for a missing file and ValueError for an architecture or
    setting that no component implements, or for weights that do not fit.
    """
    folder = Path(folder)
    description = describe(folder, trust_imports=trust_imports)
    tables: dict[str, Any] = dict(description.tables)
    if recurrence is not None:
        tables["recurrence"] = dict(recurrence)
    recipe = load_recipe({**tables, **(overrides or {})})
    for line in scale.difference(recipe, description.recurrence):
        warnings.warn(f"{folder}: {line}", stacklevel=2)
    model = build_model(recipe, device="meta")
    if isinstance(model.unroll, nn.Module) or any(True for _ in model.decoder.buffers()):
        model = build_model(recipe)  # it has tensors that no file need give
    load_weights(model, folder, assign=True)
    return model.to(dtype).requires_grad_(True)


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    *,
    max_shard_size: str = "5GB",
    imports: Iterable[str] = (),
    eos_id: int | None = None,
) -> None:
    """Writes a directory that transformers loads: `config.json` and safetensors, sharded where they are
    larger than `max_shard_size`.

    A plain model is an architecture of transformers. Any other is run by the file `modeling_lattice.py` that
    is written too, with `trust_remote_code=True` and this package installed; `imports` are the recipe's, and
    the files among them go along. `eos_id` is the token that ends a text in `generate`: a model does not know
    its tokenizer's. Raises ValueError for a component that no file or package defines.
    """
    write_model(model, Path(folder), max_shard_size=max_shard_size, imports=imports, eos_id=eos_id)
