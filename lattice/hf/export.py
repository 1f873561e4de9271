"""`lattice export`: a run's model, tokenizer and model card as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lattice.atomic import write_json
from lattice.build import build_model
from lattice.hf.card import write_card
from lattice.hf.tokenizer import export_tokenizer
from lattice.hf.write import is_plain, write_model
from lattice.load import codec_of, locate, recipe_of
from lattice.model import LanguageModel
from lattice.protocols import Checkpoint, Codec
from lattice.state import weights


def export(run: str | Path, folder: str | Path, *, trust_imports: bool = False) -> None:
    """Writes `folder` from a run (its latest checkpoint) or one of its checkpoints.

    Raises FileNotFoundError where there is no run or no checkpoint; ValueError where a checkpoint is damaged,
    where the recipe imports code and that is not allowed, and where a component cannot go along.
    """
    run, checkpoint = locate(Path(run))
    folder = Path(folder)
    recipe = recipe_of(run, trust_imports=trust_imports)
    codec = codec_of(run, trust_imports=trust_imports)
    component: Checkpoint = recipe.component("checkpoint")
    checkpointer = component.build(run / "checkpoints")
    checkpoint = checkpoint or checkpointer.latest()
    if checkpoint is None:
        raise FileNotFoundError(f"'{run}' has no checkpoint yet")
    model = build_model(recipe)
    facts = checkpointer.load(checkpoint, {"model": weights(model)})
    imports = write_model(model, folder, imports=recipe.imports)
    read = export_tokenizer(codec, run / "tokenizer", folder, model.shape.context)
    write_json(folder / "generation_config.json", _generation(model, codec))
    write_card(run, folder, recipe, facts, plain=is_plain(model), tokenizer=read, trust=bool(imports))


def _generation(model: LanguageModel, codec: Codec) -> dict[str, Any]:
    """What ends a text, and the rows of the table that are no token."""
    never = list(range(codec.vocab_size, model.shape.vocab_size))
    config: dict[str, Any] = {"eos_token_id": codec.eos_id, "pad_token_id": codec.eos_id}
    return config | ({"suppress_tokens": never} if never else {})
