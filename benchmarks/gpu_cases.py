"""What the parts of benchmarks/gpu.py share: a line of jsonl for each case, models, and how they compare."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lattice
from lattice.build import undrawn_model
from lattice.components.compile.block import CompileBlock
from lattice.console import say

ROOT = Path(__file__).parents[1]
TINY = {
    "kind": "gpt_neox",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"kind": "fp32"},
    "bf16": {"kind": "bf16"},
    "float8": {"kind": "float8", "recipe": "rowwise", "min_features": 512},
    "float8_tensorwise": {"kind": "float8", "recipe": "tensorwise", "min_features": 512},
    "float8_gw": {"kind": "float8", "recipe": "rowwise_with_gw_hp", "min_features": 512},
    "float8_large": {"kind": "float8", "recipe": "rowwise"},
}
"""By name on the command line; "float8_large" converts what the kind converts if nothing is said."""


Cases = Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]
"""Labels, and what is to be done: it is given a dict for what it finds."""


class Report:
    """A line of jsonl for each case, whatever comes of it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.failed: Counter[str] = Counter()
        """Cases of each part."""
        installed = {name: version(name) for name in ("torchao", "triton")}
        self._facts = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **installed},
        }

    @contextmanager
    def case(self, part: str, **labels: Any) -> Iterator[dict[str, Any]]:
        """Gives a dict for what is found; whatever is raised becomes the line's `error`."""
        found: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            yield found
        except Exception as error:  # a case may fail in any way, and the next one must still run
            found["error"] = f"{type(error).__name__}: {error}"[:2000]
            self.failed[part] += 1
        seconds = round(time.perf_counter() - start, 3)
        line = {
            "part": part,
            **self._facts,
            **labels,
            **found,
            "ok": "error" not in found,
            "seconds": seconds,
        }
        with (self._folder / f"gpu_{part}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name: value for name, value in line.items() if name not in self._facts}
        say(" ".join(f"{name}={value}" for name, value in shown.items()))
        free()


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recipe_of(
    size: str,
    thoughts: int,
    *,
    device: torch.device,
    precision: str = "bf16",
    checkpointing: str = "none",
    layers: int | None = None,
) -> lattice.Recipe:
    """A Pythia of that size; each training step refines three times, so that all cost the same."""
    path = ROOT / "recipes" / "base" / f"pythia_{size}.toml"
    table = {"backbone": TINY} if size == "tiny" else lattice.load_recipe(path).table()
    backbone = table["backbone"] | ({"num_hidden_layers": layers} if layers else {})
    thinking = {"kind": "latent_thoughts", "thoughts": thoughts, "jacobi": {"train": [3, 3], "eval": 3}}
    chosen = dict(PRECISIONS[precision])
    if chosen["kind"] == "float8" and device.type != "cuda":
        chosen |= {"emulate": True, "min_features": 64}
    return lattice.load_recipe(
        {
            "backbone": backbone,
            "recurrence": thinking if thoughts else {"kind": "none"},
            "precision": chosen,
            "activation_checkpoint": {"kind": checkpointing},
            "optimizer": table.get("optimizer", {"kind": "adamw"}),
        }
    )


def build(recipe: lattice.Recipe, device: torch.device, *, drawn: bool = True) -> lattice.LanguageModel:
    """With `drawn` the weights are drawn as the recipe says, one after the other on the CPU; else they are
    what torch gives new modules on the device, which is sooner for a large model."""
    torch.manual_seed(0)
    with device:
        model = undrawn_model(recipe)
    if drawn:
        model.decoder.initialize(model.recurrence.initialization(model.shape))
    recipe.component("precision").apply(model)
    return model


def compile_layers(model: lattice.LanguageModel, device: torch.device) -> None:
    """On a CPU traced only: its code would take minutes to build."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    CompileBlock(backend=backend, fullgraph=True).apply(model)


def some_ids(model: lattice.LanguageModel, rows: int, length: int) -> Tensor:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(model.shape.vocab_size, (rows, length), generator=generator).to(device)
