"""Byte-level BPE, trained on the run's own training text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lattice.components.tokenizer._codecs import CONFIG, MODEL, FastCodec, load_codec, load_config
from lattice.protocols import Codec, Tokenizer
from lattice.registry import register

EOS = "<|endoftext|>"
BYTES = 256


@register("tokenizer", "bpe")
@dataclass(frozen=True, kw_only=True)
class BpeTokenizer(Tokenizer):
    """A byte-level BPE, as GPT-2's, trained on the first text of the data; deterministic."""

    vocab_size: int = 4096
    """Tokens to train, with the 256 bytes and the end of document; a small text may yield fewer."""
    sample_bytes: int = 20_000_000
    """UTF-8 bytes of text to train on, from the start of the data."""

    def __post_init__(self) -> None:
        if self.vocab_size <= BYTES:
            raise ValueError(f"vocab_size = {self.vocab_size}: must be at least {BYTES + 1} (bytes and eos)")
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes = {self.sample_bytes}: must be at least 1")

    def build(self, folder: Path | None, corpus: Callable[[], Iterator[str]] | None = None) -> Codec:
        if folder is not None and (folder / MODEL).is_file():
            return self._saved(folder)
        if corpus is None:
            raise ValueError(
                "kind = 'bpe': needs text to train on, and this data gives none. Prepare the data with "
                "`lattice prepare … --train-bpe N`, then set tokenizer.kind to 'huggingface' and "
                "tokenizer.name to the folder 'tokenizer' of the prepared data"
            )
        codec = self._train(corpus())
        if folder is not None:
            codec.save(folder, {"lattice": {"kind": "bpe", **asdict(self)}})
        return codec

    @property
    def spec(self) -> str:
        """A placeholder: prepared data needs a tokenizer that was trained before."""
        return "TOKENIZER"

    @classmethod
    def from_spec(cls, spec: str) -> Tokenizer | None:
        """None: `lattice prepare --train-bpe N` asks for this kind."""
        return None

    def _saved(self, folder: Path) -> FastCodec:
        config = load_config(folder / CONFIG)
        codec = load_codec(folder / MODEL, config)
        made = config.get("lattice", {"kind": "bpe", "vocab_size": codec.vocab_size})
        if made.get("kind") != "bpe":
            raise ValueError(
                f"{folder} holds a tokenizer of kind {made.get('kind')!r}, not 'bpe': set tokenizer.kind to "
                "that, or delete the folder to train one"
            )
        for option, wanted in asdict(self).items():
            if made.get(option, wanted) != wanted:
                raise ValueError(
                    f"{option} = {wanted}: the tokenizer saved in {folder} was trained with {made[option]}; "
                    "set that, or delete the folder to train again"
                )
        return codec

    def _train(self, texts: Iterator[str]) -> FastCodec:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = FastTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_head(texts, self.sample_bytes), trainer)
        return FastCodec(tokenizer, EOS)


def _head(texts: Iterator[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` UTF-8 bytes, the last one cut. Raises ValueError if there is no text at all."""
    left = limit
    for text in texts:
        encoded = text.encode("utf-8")[:left]
        left -= len(encoded)
        if encoded:
            yield encoded.decode("utf-8", errors="ignore")
        if left == 0:
            return
    if left == limit:
        raise ValueError("kind = 'bpe': the data has no text to train on")
