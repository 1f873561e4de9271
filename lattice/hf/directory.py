"""A Hugging Face directory: `config.json` and safetensors.

Parameter names are Hugging Face's own, so that weights pass through unchanged. A recurrence's own parameters
stand beside them under `recurrence.`, and its table in a `config.json` whose `model_type` is `lattice`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lattice import options, registry, toml_source
from lattice.model import LanguageModel
from lattice.protocols import Backbone, Recurrence
from lattice.recipe import load_recipe
from lattice.sharded import put

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_TYPE = "lattice"
"""Of a model that no architecture of transformers computes: its tables are a recipe's."""
TABLES = ("backbone", "recurrence", "mask")
RECURRENCE = "recurrence."
"""Begins the names of a recurrence's own parameters."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Description:
    """What a `config.json` says."""

    backbone: Backbone
    recurrence: Recurrence
    """The one that the weights were trained with."""
    tables: dict[str, dict[str, Any]]
    """The recipe's tables: `backbone`, and for a model of ours also `recurrence` and `mask`."""
    imports: tuple[str, ...] = ()
    """User code that the tables need: files of the directory, or installed packages by dotted name."""


def describe(folder: Path, *, trust_imports: bool = False) -> Description:
    """Reads a directory's `config.json`.

    Raises FileNotFoundError where there is none, ValueError, with the file's name, for an architecture or
    setting that no component implements and for a directory whose code may not be imported.
    """
    config = _config(folder)
    if config.get("model_type") != MODEL_TYPE:
        backbone = read_backbone(folder)
        return Description(backbone, plain_recurrence(), {"backbone": options.to_table(backbone)})
    imports = _imports(folder, config)
    if imports and not trust_imports:
        raise ValueError(
            f"{folder / CONFIG}: this model imports code ({', '.join(imports)}): allow it with "
            "trust_imports, if you trust it"
        )
    for name in imports:
        registry.import_user_code(name, Path.cwd())
    tables = {role: config[role] for role in TABLES if role in config}
    components = {role: _component(folder, role, table) for role, table in tables.items()}
    recurrence = components.get("recurrence") or plain_recurrence()
    return Description(components["backbone"], recurrence, tables, tuple(imports))


def read_backbone(folder: Path) -> Backbone:
    """The backbone that a directory's `config.json` describes; nothing of the directory is executed."""
    config, path = _config(folder), folder / CONFIG
    if config.get("model_type") == MODEL_TYPE:
        if "backbone" not in config:
            raise ValueError(f"{path}: backbone: missing")
        known: Backbone = _component(folder, "backbone", config["backbone"])
        return known
    try:
        backbone = _of_transformers(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    found: Backbone = _component(folder, "backbone", options.to_table(backbone))
    return found


def _of_transformers(config: dict[str, Any]) -> Backbone:
    """The backbone of a model of transformers. Raises ValueError unless exactly one kind reads it; what that
    raises is passed on."""
    readers = registry.defining("backbone", "from_hf")
    read = {kind: cls.from_hf(config) for kind, cls in readers.items()}  # type: ignore[attr-defined]
    found: dict[str, Backbone] = {kind: backbone for kind, backbone in read.items() if backbone is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    start = f"model_type = {config.get('model_type')!r}"
    if found:
        raise ValueError(f"{start}: several kinds of backbone read it, {', '.join(found)}: only one may")
    raise ValueError(f"{start}: must be one of {', '.join(readers)}")


def as_read(backbone: Backbone) -> Backbone | None:
    """What is read from the `config.json` of the backbone's architecture in transformers: the same backbone,
    with what was left open filled in. None where it has none there, or another backbone is read."""
    config = backbone.to_hf()
    if config is None:
        return None
    try:
        read = _of_transformers(config)
    except (TypeError, ValueError):
        return None
    return read if options.to_table(backbone).items() <= options.to_table(read).items() else None


def read_recurrence(folder: Path) -> Recurrence | None:
    """The recurrence that a directory's weights were trained with; None for a kind that nothing has
    registered, since nothing of the directory is executed."""
    table = _config(folder).get("recurrence")
    if table is None:
        return plain_recurrence()
    if not isinstance(table, dict) or table.get("kind") not in registry.kinds("recurrence"):
        return None
    known: Recurrence = _component(folder, "recurrence", table)
    return known


def plain_recurrence() -> Recurrence:
    """The recurrence of a recipe that says nothing, which is that of a model of transformers."""
    plain: Recurrence = load_recipe({}).component("recurrence")
    return plain


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a directory with {CONFIG} and {WEIGHTS}, as "
            "`save_pretrained` of transformers writes it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no valid JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(config).__name__}")
    return config


def _component(folder: Path, role: str, table: Any) -> Any:
    """The component of a table; every option is checked as a recipe's is."""
    problems: list[str] = []
    source = toml_source.plain({role: table}, str(folder / CONFIG))
    component = options.component(role, (role,), source, problems)
    if problems:
        raise ValueError("\n".join(problems))
    return component


def _imports(folder: Path, config: dict[str, Any]) -> list[str]:
    names = config.get("imports") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / CONFIG}: imports = {names!r}: must be a list of strings")
    for name in names:
        if name.endswith(".py") and Path(name).name != name:
            raise ValueError(f"{folder / CONFIG}: imports: '{name}' must be a file of the directory itself")
    return [str((folder / name).resolve()) if name.endswith(".py") else name for name in names]


# ── weights ───────────────────────────────────────────────────────────────────────────────────────
def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, from one file or from the shards that its index names; buffers that older
    checkpoints carry are left out. Raises FileNotFoundError, ValueError."""
    weights: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: no valid safetensors file: {error}") from error
    return {name: tensor for name, tensor in weights.items() if not _is_old_buffer(name)}


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of what `read_weights` reads, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: no valid safetensors file: {error}") from error
    return {name: shape for name, shape in shapes.items() if not _is_old_buffer(name)}


def _files(folder: Path) -> list[Path]:
    names = [WEIGHTS]
    # Where both are there, transformers has left the index from an earlier save.
    if (index := folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{index}: no valid index of shards: {error}") from error
    for name in names:
        if not (folder / name).is_file():
            others = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; {others[0]} is not read: convert it to safetensors" if others else ""
            raise FileNotFoundError(f"{folder / name} does not exist{hint}")
    return [folder / name for name in names]


def _is_old_buffer(name: str) -> bool:
    return name.endswith(("rotary_emb.inv_freq", ".attention.bias", ".masked_bias"))


def own_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The recurrence's own parameters and persistent buffers, by their names in a directory."""
    if not isinstance(model.unroll, nn.Module):
        return {}
    return {RECURRENCE + name: tensor for name, tensor in model.unroll.state_dict().items()}


def misfits(model: LanguageModel, shapes: Shapes) -> list[str]:
    """Where names or shapes differ from the model's. What a recurrence has of its own may be missing."""
    expected = {**model.decoder.state_dict(), **own_tensors(model)}
    parameters = dict(model.decoder.named_parameters())  # a tied head is listed once
    problems = [f"{name} is missing" for name in parameters if name not in shapes]
    problems += [f"{name} has no place in this model" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shape}, must be {tuple(expected[name].shape)}"
        for name, shape in shapes.items()
        if name in expected and shape != tuple(expected[name].shape)
    ]
    return problems


def few(problems: list[str], most: int = 5) -> str:
    """The first problems, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


@torch.no_grad()
def load_weights(model: LanguageModel, folder: Path, *, assign: bool = False) -> list[str]:
    """Puts a directory's weights into the model; returns the names that the directory lacks, all of them of
    the recurrence, whose tensors stay as they are.

    With `assign` the tensors of the file become the model's parameters, whatever their number format.
    Raises FileNotFoundError and ValueError, with nothing changed.
    """
    weights = read_weights(folder)
    problems = misfits(model, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    problems += _tied_twice(model, weights)
    if problems:
        raise ValueError(f"{folder}: weights do not fit {CONFIG}: {few(problems)}")
    tied = model.decoder.head.weight is model.decoder.embedding.weight
    theirs = {name: tensor for name, tensor in weights.items() if not name.startswith(RECURRENCE)}
    _fill(model.decoder, theirs, assign=assign)
    if tied and assign:  # the file holds the shared weight under one of its names, or under both
        model.decoder.head.weight = model.decoder.embedding.weight
    if isinstance(model.unroll, nn.Module):
        own = {name.removeprefix(RECURRENCE): weights[name] for name in own_tensors(model) if name in weights}
        _fill(model.unroll, own, assign=assign)
    return [name for name in own_tensors(model) if name not in weights]


def _fill(module: nn.Module, tensors: dict[str, Tensor], *, assign: bool) -> None:
    """Where the module is divided among ranks, each takes its share."""
    if assign:
        module.load_state_dict(tensors, assign=True, strict=False)
        return
    own = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        put(own[name], tensor)


def _tied_twice(model: LanguageModel, weights: Mapping[str, Tensor]) -> list[str]:
    """A shared weight that the file holds under several names with different values."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.decoder.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    problems = []
    for first, *others in names.values():
        held = [name for name in (first, *others) if name in weights]
        for name in held[1:]:
            if not torch.equal(weights[held[0]], weights[name]):
                problems.append(f"{held[0]} and {name} are one tied weight, but the file's two differ")
    return problems
