"""`lattice prepare`: documents into shards of tokens.

One thread reads, others or other processes encode (lattice.prepare_encoding), this one writes. What a
document becomes depends on nothing but its text and its place in the sources, and shards end at fixed places;
so a preparation that is interrupted and run again, with any number of workers, ends with the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lattice.atomic import CannotWrite
from lattice.documents import Place, find_sources, texts
from lattice.prepare_encoding import Encoder, encoded_documents
from lattice.prepare_journal import Journal, opened
from lattice.prepare_progress import progress
from lattice.protocols import Tokenizer
from lattice.registry import defining, lookup
from lattice.shard_writer import SplitWriter

TOKENIZER_FOLDER = "tokenizer"
log = logging.getLogger(__name__)


def prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer: str | None = None,
    *,
    train_bpe: int | None = None,
    validation_fraction: float = 0.0,
    text_key: str = "text",
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes `sources` into the directory `out` and returns its manifest.

    sources: files, folders or Hugging Face datasets (lattice.documents).
    tokenizer: a spec such as "bytes", "gpt2", "path/tokenizer.json"; None with `train_bpe`, the vocabulary
    size of a byte-level BPE to train on the sources.
    validation_fraction: share of documents, chosen by a hash of their text, that go to the validation split.
    shard_tokens: a shard ends with the document that reaches this many tokens, over both splits.
    workers: processes that encode; with 0 this one does, on all cores inside the tokenizer; same bytes.

    Run again after an interruption it continues; run on a finished directory it returns what is there.
    Raises ValueError, CannotWrite or FileNotFoundError with a message for the user: a source that cannot be
    read or decoded, a directory that holds something else, a full disk.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction = {validation_fraction}: must be at least 0 and below 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens = {shard_tokens}: must be at least 1")
    if workers < 0:
        raise ValueError(f"workers = {workers}: must be at least 0")
    spec, maker = _tokenizer(tokenizer, train_bpe)
    found, skipped = find_sources(sources, text_key)
    if skipped:
        log.warning("%d entries of the folders are no text and are left out: %s", len(skipped), _few(skipped))
    settings = {
        "sources": list(sources),
        "tokenizer": spec,
        "validation_fraction": validation_fraction,
        "text_key": text_key,
        "shard_tokens": shard_tokens,
        "files": [{"file": source.name, "bytes": source.size} for source in found],
    }
    with opened(out, settings) as journal:
        if journal.finished is not None:
            log.warning("%s is already prepared: nothing to do", out)
            return journal.finished
        codec = maker.build(out / TOKENIZER_FOLDER, lambda: texts(found))
        journal.begin(codec)
        try:
            encoder = Encoder(found, codec, validation_fraction)
            _write_shards(encoder, maker, journal, workers, show_progress)
        except CannotWrite as error:
            raise CannotWrite(
                f"{error}. {journal.describe()} Free some space, then run the same command again to continue"
            ) from error
        if journal.empty:
            log.warning("%d empty documents are left out", journal.empty)
        return journal.finish(codec, {"spec": spec, "kind": maker.kind})  # type: ignore[attr-defined]


def _tokenizer(spec: str | None, train_bpe: int | None) -> tuple[str, Tokenizer]:
    if train_bpe is not None:
        if spec not in (None, "bpe"):
            raise ValueError(f"tokenizer = {spec!r}: cannot be combined with train_bpe = {train_bpe}")
        maker: Tokenizer = lookup("tokenizer", "bpe")(vocab_size=train_bpe)
        return f"--train-bpe {train_bpe}", maker
    if spec is None:
        raise ValueError("tokenizer: missing; give --tokenizer SPEC or --train-bpe N")
    readers = defining("tokenizer", "from_spec").values()
    claims = [c for kind in readers if (c := kind.from_spec(spec)) is not None]  # type: ignore[attr-defined]
    if len(claims) != 1:
        which = f"{len(claims)} kinds of tokenizer claim it" if claims else "no kind of tokenizer knows it"
        raise ValueError(
            f"tokenizer = {spec!r}: {which}; give 'bytes', a tokenizer.json or its folder, a SentencePiece "
            ".model, a name on the Hugging Face hub, or use --train-bpe N"
        )
    return spec, claims[0]


def _few(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _write_shards(
    encoder: Encoder, maker: Tokenizer, journal: Journal, workers: int, show_progress: bool
) -> None:
    """Reads, encodes and writes from where the journal stands to the end of the sources."""
    writers = {
        split: SplitWriter(journal.folder, split, encoder.codec, shards)
        for split, shards in journal.splits.items()
    }
    empty = journal.empty
    stream = encoded_documents(
        encoder,
        Place(*journal.position),
        workers=workers,
        maker=maker,
        folder=journal.folder / TOKENIZER_FOLDER,
    )
    try:
        with progress(show_progress, [source.name for source in encoder.sources]) as report, closing(stream):
            for document in stream:
                if len(document.ids):
                    split = "validation" if document.held_out else "train"
                    writers[split].add(document.ids, document.bytes)
                else:
                    empty += 1
                report(document)
                if sum(w.tokens for w in writers.values()) >= journal.settings["shard_tokens"]:
                    source, record = document.place
                    _complete(writers, journal, (source, record + 1), empty)
        _complete(writers, journal, (len(encoder.sources), 0), empty)
    finally:
        for writer in writers.values():
            writer.abandon()


def _complete(
    writers: dict[str, SplitWriter], journal: Journal, position: tuple[int, int], empty: int
) -> None:
    # Both splits end their shards together: one position then says what is complete.
    for writer in writers.values():
        writer.finish_shard()
    journal.complete({split: writer.shards for split, writer in writers.items()}, position, empty)
