"""`lattice export`: a run's model, tokenizer and model card as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from lattice.atomic import write_json
from lattice.build import build_model
from lattice.codec import saved_codec
from lattice.hf.card import LIBRARY, write_card
from lattice.hf.tokenizer import export_tokenizer
from lattice.hf.write import is_plain, write_model
from lattice.load import locate, recipe_of, saved
from lattice.model import LanguageModel
from lattice.protocols import Codec
from lattice.state import weights


def export(run: str | Path, folder: str | Path, *, trust_imports: bool = False) -> None:
    """Writes `folder` from a run (its latest checkpoint) or one of its checkpoints.

    Raises FileNotFoundError where there is no run or no checkpoint; FileExistsError where `folder` holds
    something else than an earlier export; ValueError where a checkpoint is damaged,
    where the recipe imports code and that is not allowed, and where a component cannot go along.
    """
    folder = Path(folder)
    _check_free(folder)
    recipe = recipe_of(run, trust_imports=trust_imports)
    checkpointer, checkpoint = saved(Path(run), recipe)
    run, _ = locate(Path(run))
    model = build_model(recipe)
    facts = checkpointer.load(checkpoint, {"model": weights(model)})
    codec = saved_codec(recipe, run, facts)
    imports = write_model(model, folder, imports=recipe.imports, eos_id=codec.eos_id)
    read = export_tokenizer(codec, run / "tokenizer", folder, model.shape.context)
    write_json(folder / "generation_config.json", _generation(model, codec))
    write_card(run, folder, recipe, facts, plain=is_plain(model), tokenizer=read, trust=bool(imports))


def _check_free(folder: Path) -> None:
    """Raises FileExistsError where the directory holds other things than an earlier export."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    card = folder / "README.md"
    if not card.is_file() or LIBRARY not in (metadata_load(card) or {}).get("tags", []):
        raise FileExistsError(
            f"'{folder}' is not empty and holds no earlier export, whose files might be replaced: choose "
            "another directory with --to, or remove this one"
        )


def _generation(model: LanguageModel, codec: Codec) -> dict[str, Any]:
    """What ends a text, and the rows of the table that are no token."""
    never = list(range(codec.vocab_size, model.shape.vocab_size))
    config: dict[str, Any] = {"eos_token_id": codec.eos_id, "pad_token_id": codec.eos_id}
    return config | ({"suppress_tokens": never} if never else {})
