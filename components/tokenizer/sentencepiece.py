"""A SentencePiece model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lattice.atomic import write_file
from lattice.protocols import Codec, Tokenizer
from lattice.registry import register

MODEL = "tokenizer.model"


class SentencePieceCodec:
    """Encodes with the `sentencepiece` library, on all cores. `source` names the model in messages."""

    def __init__(self, model: bytes, source: Path) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except Exception as error:  # the library raises RuntimeError or its own
            raise ValueError(f"{source} is no SentencePiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{source} has no end-of-sentence piece: train it with an eos_id")
        self.fingerprint = hashlib.sha256(b"sentencepiece\n" + model).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        threads = os.cpu_count() or 1
        encoded: list[list[int]] = self._processor.encode(texts, out_type=int, num_threads=threads)
        return encoded

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))


@register("tokenizer", "sentencepiece")
@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` trained with SentencePiece, such as Llama 2's."""

    path: str
    """The model file."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path = '': must be the path of a SentencePiece model file")

    def build(self, folder: Path | None, corpus: Callable[[], Iterator[str]] | None = None) -> Codec:
        saved = folder / MODEL if folder is not None and (folder / MODEL).is_file() else None
        source = Path(self.path)
        if saved is None and not source.is_file():
            raise FileNotFoundError(
                f"path = {self.path!r}: no such file; put the model there, or set tokenizer.path to it"
            )
        if saved is None:
            model = source.read_bytes()
            codec = SentencePieceCodec(model, source)
            if folder is not None:
                write_file(folder / MODEL, model)
            return codec
        model = saved.read_bytes()
        if source.is_file() and source.read_bytes() != model:
            raise ValueError(
                f"path = {self.path!r}: differs from the model saved as {saved}; go on with the saved one by "
                "setting path to it, or start in an empty folder"
            )
        return SentencePieceCodec(model, saved)

    @property
    def spec(self) -> str:
        return self.path

    @classmethod
    def from_spec(cls, spec: str) -> Tokenizer | None:
        return cls(path=spec) if spec.endswith(".model") else None
