"""UTF-8 bytes as tokens: nothing to train, nothing to download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lattice.protocols import Codec, Tokenizer
from lattice.registry import register

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer


class BytesCodec:
    """Ids 0..255 are the bytes; 256 ends a document and decodes to nothing."""

    vocab_size = 257
    eos_id = 256
    eos = "<|endoftext|>"
    """What a `tokenizer.json` calls it; no text encodes to it."""
    fingerprint = hashlib.sha256(b"lattice bytes 1").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Raises ValueError for an id that is no byte and not the end of a document."""
        wrong = next((i for i in ids if not 0 <= i <= self.eos_id), None)
        if wrong is not None:
            raise ValueError(f"id {wrong} cannot be decoded: the bytes tokenizer has ids 0 to {self.eos_id}")
        return bytes(i for i in ids if i != self.eos_id).decode("utf-8", errors="replace")

    @property
    def tokenizer(self) -> FastTokenizer:
        """The same ids from the `tokenizers` library: a byte-level BPE without merges."""
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        tokenizer = FastTokenizer(
            models.BPE(vocab={char: byte for byte, char in _chars().items()}, merges=[])
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([self.eos])
        return tokenizer


def _chars() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies since GPT-2: those that cannot be
    printed are shifted beyond 255, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in sorted(printable)} | {b: chr(256 + n) for n, b in enumerate(others)}


@register("tokenizer", "bytes")
@dataclass(frozen=True, kw_only=True)
class BytesTokenizer(Tokenizer):
    """257 tokens: the 256 bytes of UTF-8 and an end of document."""

    def build(self, folder: Path | None, corpus: Callable[[], Iterator[str]] | None = None) -> Codec:
        return BytesCodec()

    @property
    def spec(self) -> str:
        return "bytes"

    @classmethod
    def from_spec(cls, spec: str) -> Tokenizer | None:
        return cls() if spec == "bytes" else None
