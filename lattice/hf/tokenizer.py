"""A run's tokenizer as files that `AutoTokenizer` of transformers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lattice.atomic import write_file, write_json
from lattice.protocols import Codec

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

MODEL = "tokenizer.json"
CONFIG = "tokenizer_config.json"
DROPPED = (
    "lattice",  # how the run came by it
    "auto_map",  # code that does not go along
    "name_or_path",
    "tokenizer_file",
    "add_bos_token",  # no text was trained on with tokens around it
    "add_eos_token",
    "added_tokens_decoder",  # those that there are stand in tokenizer.json
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)


@runtime_checkable
class Fast(Protocol):
    """A codec that the `tokenizers` library can be."""

    eos: str
    """The token that ends a document."""

    @property
    def tokenizer(self) -> FastTokenizer: ...


def export_tokenizer(codec: Codec, saved: Path, folder: Path, context: int) -> bool:
    """Writes the tokenizer to `folder`: ids as the model was trained on, without special tokens.

    `saved` is where the run keeps it, `context` the longest sequence in tokens. Returns whether
    `AutoTokenizer` reads it; what it cannot read is copied as it is.
    """
    if not isinstance(codec, Fast):
        for path in sorted(saved.glob("*")):
            shutil.copyfile(path, folder / path.name)
        return False
    config: dict[str, Any] = {}
    if (saved / CONFIG).is_file():
        config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    config = _of_this_vocabulary(config, codec.tokenizer)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # whatever it was: tokenizer.json says all
        "eos_token": codec.eos,
        "bos_token": codec.eos,  # a document was trained on after the end of another, and after nothing else
        "pad_token": config.get("pad_token") or codec.eos,
        "padding_side": "left",  # what generating in batches needs
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / CONFIG, config)
    write_file(folder / MODEL, _without_additions(codec.tokenizer).encode("utf-8"))
    return True


def _of_this_vocabulary(config: dict[str, Any], tokenizer: FastTokenizer) -> dict[str, Any]:
    """The configuration without tokens that the tokenizer lacks: `AutoTokenizer` would give each an id of its
    own, which the model's table does not have. Nor may a word of the vocabulary become a special token: it
    would then be cut out of longer ones."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    kept = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name not in DROPPED and (not name.endswith("_token") or token in added):
            kept[name] = value
    return kept


def _without_additions(tokenizer: FastTokenizer) -> str:
    """The tokenizer's JSON, without the step that puts special tokens around a text, if it has one."""
    content = json.loads(tokenizer.to_str())
    if tokenizer.num_special_tokens_to_add(False):
        content["post_processor"] = None
    return json.dumps(content, indent=2, ensure_ascii=False)
