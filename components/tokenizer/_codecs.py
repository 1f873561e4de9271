"""A codec around `tokenizers.Tokenizer`, and the folder it is saved to.

A saved tokenizer is `tokenizer.json` with `tokenizer_config.json` beside it, as on the Hugging Face hub; the
latter names the end-of-document token and, under the key "lattice", the options it was made with.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattice.atomic import write_file, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

MODEL = "tokenizer.json"
CONFIG = "tokenizer_config.json"
COMMON_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class FastCodec:
    """Encodes with the `tokenizers` library, on all cores.

    Special tokens spelt out in a text are encoded as the characters they are: a document cannot end itself.
    """

    def __init__(self, tokenizer: FastTokenizer, eos: str) -> None:
        """Raises ValueError if `eos` is no token."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        eos_id = tokenizer.token_to_id(eos)
        if eos_id is None:
            raise ValueError(f"eos = {eos!r}: is no token of the tokenizer. {_special_tokens(tokenizer)}")
        self.tokenizer = tokenizer
        self.eos = eos
        self.eos_id: int = eos_id
        # Ids may have gaps, so that the number of tokens is not what an embedding needs.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        content = json.dumps(["tokenizers", eos, json.loads(tokenizer.to_str())], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """The model is written last: where it lies, the folder is complete."""
        write_json(folder / CONFIG, {**config, "eos_token": self.eos})
        write_file(folder / MODEL, self.tokenizer.to_str(pretty=True).encode("utf-8"))


def _special_tokens(tokenizer: FastTokenizer) -> str:
    special = [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special]
    return f"Its special tokens: {', '.join(special[:50]) or 'none'}"


def load_config(path: Path) -> dict[str, Any]:
    """A `tokenizer_config.json`; empty if there is none. Raises ValueError if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(config).__name__}")
    return config


def load_codec(path: Path, config: dict[str, Any], eos: str | None = None) -> FastCodec:
    """The codec of a `tokenizer.json`. End of document: `eos`, else the configuration's, else a common name.

    Raises ValueError if the file is damaged or no end of document is found.
    """
    from tokenizers import Tokenizer as FastTokenizer

    try:
        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is no tokenizer.json that the tokenizers library reads: {error}") from error
    if eos is None:
        named = config.get("eos_token")
        eos = named.get("content") if isinstance(named, dict) else named
        if not isinstance(eos, str | None):
            raise ValueError(f"{path.with_name(CONFIG)}: eos_token = {eos!r}: must be a token's text")
    if eos is None:
        eos = next((token for token in COMMON_EOS if tokenizer.token_to_id(token) is not None), None)
    if eos is None:
        raise ValueError(
            f"{path} does not say which token ends a document: set the option 'eos' of the tokenizer. "
            f"{_special_tokens(tokenizer)}"
        )
    return FastCodec(tokenizer, eos)
