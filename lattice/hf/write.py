"""Writes a model as a Hugging Face directory: `config.json`, weights and, where needed, code.

What is an architecture of transformers needs no code. For the rest `config.json` names `modeling_lattice.py`,
a few lines over this package, beside which the user's own component files go along.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from lattice.atomic import make_folder, write_file, write_json
from lattice.attention_mask import is_causal
from lattice.hf.directory import CONFIG, MODEL_TYPE, TABLES, as_read, own_tensors, plain_recurrence
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.protocols import kind_of
from lattice.slots import Slots, Tokens
from lattice.user_code import free_name

TEMPLATE = Path(__file__).with_name("modeling_lattice.py")
AUTO_MAP = {
    "AutoConfig": f"{TEMPLATE.stem}.LatticeConfig",
    "AutoModelForCausalLM": f"{TEMPLATE.stem}.LatticeForCausalLM",
}


def write_model(
    model: LanguageModel,
    folder: Path,
    *,
    max_shard_size: str = "5GB",
    imports: Iterable[str] = (),
    eos_id: int | None = None,
) -> list[str]:
    """See `lattice.save_pretrained`; returns the names of the files of code and the packages that the model
    needs besides this package."""
    names: list[str] = []
    make_folder(folder)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if is_plain(model):
        config = {**model.components["backbone"].to_hf(), "dtype": dtype, "torch_dtype": dtype}
    else:
        names = _write_code(model, folder, imports)
        config = {**_config(model, names), "dtype": dtype}
    # Null where there is none: an architecture of transformers would put tokens of its own there.
    tokens = {"bos_token_id": None, "eos_token_id": eos_id}
    write_json(folder / CONFIG, {name: value for name, value in config.items() if value is not None} | tokens)
    _write_weights(model, folder, max_shard_size)
    return names


def is_plain(model: LanguageModel) -> bool:
    """Whether an architecture of transformers computes what the model does: its backbone is one there, its
    recurrence is the one of a recipe that says nothing, and its mask leaves causal order as it is, at the
    longest sequence."""
    if (
        kind_of(model.recurrence) != kind_of(plain_recurrence())
        or as_read(model.components["backbone"]) is None
    ):
        return False
    longest_BL = torch.zeros(1, model.shape.context, dtype=torch.long)
    slots = Slots.interleaved(Tokens.of(longest_BL), 1)
    return is_causal(model.mask, slots, slots)


def _config(model: LanguageModel, imports: list[str]) -> dict[str, Any]:
    return {
        "architectures": ["LatticeForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        **{role: to_table(model.components[role]) for role in TABLES},
        "imports": imports or None,
        "tie_word_embeddings": model.decoder.head.weight is model.decoder.embedding.weight,
    }


def _write_weights(model: LanguageModel, folder: Path, max_shard_size: str) -> None:
    # A tied head is the embedding's parameter and listed once, under the name that readers look for.
    weights = {name: value.detach().cpu() for name, value in model.decoder.named_parameters()}
    weights |= {name: value.detach().cpu() for name, value in own_tensors(model).items()}
    with torch.no_grad():
        save_torch_state_dict(weights, str(folder), max_shard_size=max_shard_size, safe_serialization=True)


# ── code ──────────────────────────────────────────────────────────────────────────────────────────
def _write_code(model: LanguageModel, folder: Path, imports: Iterable[str]) -> list[str]:
    """The modelling file, and copies of the user's own; returns what `config.json` lists as imports."""
    files, packages = _user_code(model, imports)
    names = _file_names(files)
    for path, name in names.items():
        if path != (folder / name).resolve():
            write_file(folder / name, path.read_bytes())
    lines = [f"import {package}  # noqa: E402, F401" for package in packages]
    # This form is the one by which transformers knows which files belong to a modelling file.
    lines += [f"from .{Path(name).stem} import *  # noqa: E402, F403" for name in names.values()]
    code = TEMPLATE.read_text(encoding="utf-8")
    if lines:
        code += "\n# The components that are not part of the package register themselves when imported.\n"
        code += "\n".join(lines) + "\n"
    write_file(folder / TEMPLATE.name, code.encode())
    return [*names.values(), *packages]


def _user_code(model: LanguageModel, imports: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Files and packages that define components which are not part of this package."""
    files = [Path(name).resolve() for name in imports if name.endswith(".py")]
    packages = [name for name in imports if not name.endswith(".py")]
    for role in TABLES:
        module = type(model.components[role]).__module__
        if module.startswith("lattice.components."):
            continue
        if module.partition(".")[0] != "__main__" and _can_be_imported(module):
            packages.append(module)
            continue
        path = getattr(sys.modules.get(module), "__file__", None)
        if path is None or module == "__main__":
            raise ValueError(
                f"{role}.kind = '{model.components[role].kind}': is defined in {module}, which cannot go "
                "along: put the class in a file of its own and name that in `imports`"
            )
        files.append(Path(path).resolve())
    return list(dict.fromkeys(files)), list(dict.fromkeys(packages))


def _can_be_imported(module: str) -> bool:
    """By its name, in another process: not a file that was loaded from a path."""
    if module.startswith(("lattice_user_", "transformers_modules.")):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _file_names(files: list[Path]) -> dict[Path, str]:
    """Each file's name in the directory: an importable one, and none twice."""
    names: dict[Path, str] = {}
    for path in files:
        stem = re.sub(r"\W", "_", path.stem)
        stem = f"_{stem}" if stem[0].isdigit() else stem
        names[path] = free_name(stem, {TEMPLATE.name, *names.values()})
    return names
