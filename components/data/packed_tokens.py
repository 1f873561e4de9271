"""Tokens prepared with `lattice prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattice.components.data._shards import TokenStream, load_manifest
from lattice.components.data._source import PackedSource, Window
from lattice.components.data._verify import verify
from lattice.prepare_journal import unfinished_command
from lattice.protocols import Codec, Data, DataRequest, Source
from lattice.registry import register

HELD_OUT = 0.01


@register("data", "packed_tokens")
@dataclass(frozen=True, kw_only=True)
class PackedTokens(Data):
    """A directory of token shards, read in shuffled sequences.

    Validation reads the split "validation" of `validation_path` if that is set (all of its "train" if it has
    no such split), else of `path`; where that has none, the last 1 % of the training tokens is held out, at
    least one sequence of them. A `validation_path` that is `path` is none: no text is both.
    """

    path: str
    """Directory that `lattice prepare` wrote."""
    validation_path: str | None = None
    """Another such directory, to validate on."""
    source: str | None = None
    """What `lattice prepare` makes it from: files or a dataset's name, for the message when it is missing."""
    workers: int = 0
    """Processes that read ahead; 0 reads in the training process. The batches are the same."""
    verify: bool = True
    """Whether to check every shard's checksum when it is first used on a machine."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path = '': must be a directory that `lattice prepare` wrote")
        if self.workers < 0:
            raise ValueError(f"workers = {self.workers}: must be at least 0")

    def problems(self, tokenizer: str) -> list[str]:
        paths = [self.path] + ([self.validation_path] if self.validation_path is not None else [])
        prepare = f"lattice prepare {self.source or 'SOURCE…'} --tokenizer {tokenizer}"
        return [problem for path in paths for problem in _problems(Path(path), f"{prepare} --out {path}")]

    def corpus(self) -> Callable[[], Iterator[str]] | None:
        """None: the text is gone, only its tokens are left."""
        return None

    def open(self, request: DataRequest) -> Source:
        return open_prepared(
            Path(self.path),
            Path(self.validation_path) if self.validation_path is not None else None,
            request,
            workers=self.workers,
            verify_shards=self.verify,
        )


def open_prepared(
    folder: Path, validation: Path | None, request: DataRequest, *, workers: int, verify_shards: bool
) -> Source:
    """The source of a prepared directory, for any component that makes one.

    Raises ValueError for shards of another tokenizer, damaged shards and too little text.
    """
    manifest = _checked_manifest(folder, request.codec)
    train = TokenStream(folder, manifest, "train")
    held_out = _validation_stream(folder, manifest, validation, request.codec)
    if verify_shards:
        verify([train, held_out] if held_out else [train], request.cache)
    if held_out is not None:
        windows = Window(train, 0, train.tokens), Window(held_out, 0, held_out.tokens)
        bytes_per_token = held_out.bytes_per_token
    else:
        size = max(request.sequence_tokens + 1, int(train.tokens * HELD_OUT))
        cut = max(0, train.tokens - size)
        windows = Window(train, 0, cut), Window(train, cut, train.tokens)
        # The bytes of only the last tokens are not recorded: those of the whole split stand for them.
        bytes_per_token = train.bytes_per_token
    return PackedSource(*windows, request, workers, bytes_per_token)


def _validation_stream(
    folder: Path, manifest: dict[str, Any], other: Path | None, codec: Codec
) -> TokenStream | None:
    """The stream to validate on; None if the training stream has to give some."""
    if other is None or other.resolve() == folder.resolve():
        stream = TokenStream(folder, manifest, "validation")
        return stream if stream.tokens > 1 else None
    manifest = _checked_manifest(other, codec)
    stream = TokenStream(other, manifest, "validation")
    return stream if stream.tokens > 1 else TokenStream(other, manifest, "train")


def _checked_manifest(folder: Path, codec: Codec) -> dict[str, Any]:
    manifest = load_manifest(folder)
    made = manifest["tokenizer"]
    if made["fingerprint"] != codec.fingerprint:
        saved = folder / "tokenizer"
        hint = f" (its tokenizer is saved in '{saved}')" if saved.is_dir() else ""
        raise ValueError(
            f"'{folder}' was prepared with the tokenizer {made.get('spec')!r} (kind {made.get('kind')!r}, "
            f"{made['vocab_size']} tokens, fingerprint {made['fingerprint'][:12]}), but the recipe's "
            f"tokenizer has {codec.vocab_size} tokens, fingerprint {codec.fingerprint[:12]}: set [tokenizer] "
            f"to the one the data was prepared with{hint}, or prepare the data again"
        )
    return manifest


def _problems(folder: Path, prepare: str) -> list[str]:
    try:
        unfinished = unfinished_command(folder)
        if unfinished is not None:
            return [f"the preparation of '{folder}' is unfinished: run `{unfinished}` again"]
        manifest = load_manifest(folder)
        for split in manifest["splits"]:
            TokenStream(folder, manifest, split)
    except FileNotFoundError as error:
        if not (folder / "manifest.json").is_file():
            return [f"no prepared data at '{folder}': run `{prepare}`"]
        return [str(error)]
    except ValueError as error:
        return [str(error)]
    return []
