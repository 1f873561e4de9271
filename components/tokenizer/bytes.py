"""UTF-8 bytes as tokens: nothing to train, nothing to download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lattice.protocols import Codec, Tokenizer
from lattice.registry import register


class BytesCodec:
    """Ids 0..255 are the bytes; 256 ends a document and decodes to nothing."""

    vocab_size = 257
    eos_id = 256
    fingerprint = hashlib.sha256(b"lattice bytes 1").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Raises ValueError for an id that is no byte and not the end of a document."""
        wrong = next((i for i in ids if not 0 <= i <= self.eos_id), None)
        if wrong is not None:
            raise ValueError(f"id {wrong} cannot be decoded: the bytes tokenizer has ids 0 to {self.eos_id}")
        return bytes(i for i in ids if i != self.eos_id).decode("utf-8", errors="replace")


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
