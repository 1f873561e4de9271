"""Real text that is on every machine: the source code of the Python standard library."""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lattice.atomic import PARTIAL, naming, write_json
from lattice.components.data.packed_tokens import open_prepared
from lattice.protocols import Codec, Data, DataRequest, Source
from lattice.registry import register
from lattice.shard_writer import MANIFEST, VERSION, SplitWriter, manifest

EXCLUDED = {
    "__pycache__",
    "dist-packages",
    "encodings",  # tables of characters, not prose and code
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
BATCH = 32
"""Files tokenized at once."""


@register("data", "embedded")
@dataclass(frozen=True, kw_only=True)
class Embedded(Data):
    """The `.py` files of the running Python's standard library, one document each.

    For examples and tests: nothing to download, but other text for another version of Python.
    """

    megabytes: float = 8.0
    """Millions of bytes of text to use, whole files; all of it is about 9."""
    validation_fraction: float = 0.05
    """Share of the text to validate on: whole files, chosen by a hash of their text."""

    def __post_init__(self) -> None:
        if not self.megabytes > 0:
            raise ValueError(f"megabytes = {self.megabytes}: must be above 0")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction = {self.validation_fraction}: must be between 0 and 1")

    def problems(self, tokenizer: str) -> list[str]:
        folder = _library()
        if next(folder.glob("*.py"), None) is None:
            return [f"no source files of Python at '{folder}': use data.kind = 'packed_tokens' instead"]
        return []

    def corpus(self) -> Callable[[], Iterator[str]] | None:
        return lambda: (text for text, held_out in self._documents() if not held_out)

    def open(self, request: DataRequest) -> Source:
        documents = self._documents()
        digest = hashlib.sha256(f"{VERSION} {request.codec.fingerprint}".encode())
        for text, held_out in documents:
            digest.update(b"%d %d " % (held_out, len(text)) + text.encode("utf-8"))
        folder = request.cache / f"embedded-{digest.hexdigest()[:24]}"
        if not (folder / MANIFEST).is_file():
            _tokenize(documents, request.codec, folder)
        return open_prepared(folder, None, request, workers=0, verify_shards=True)

    def _documents(self) -> list[tuple[str, bool]]:
        """Each text, and whether it is held out. Raises ValueError if there are fewer than two."""
        texts = _texts(self.megabytes)
        if len(texts) < 2:
            raise ValueError(
                f"megabytes = {self.megabytes}: must give two files at least, gives {len(texts)}"
            )
        wanted = self.validation_fraction * sum(len(text) for text in texts)
        held_out: set[int] = set()
        # In the order of the hashes until the share is reached; with few files still one on each side.
        for i in sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode("utf-8")).digest()):
            if held_out and (wanted <= 0 or len(held_out) == len(texts) - 1):
                break
            held_out.add(i)
            wanted -= len(texts[i])
        return [(text, i in held_out) for i, text in enumerate(texts)]


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@lru_cache(maxsize=2)
def _texts(megabytes: float) -> list[str]:
    """UTF-8 files in sorted order until the size is reached."""
    texts: list[str] = []
    left = megabytes * 1e6
    for here, folders, names in os.walk(_library()):
        folders[:] = sorted(set(folders) - EXCLUDED)
        for name in sorted(name for name in names if name.endswith(".py")):
            content = (Path(here) / name).read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                continue  # a library file may declare another encoding; enough others do not
            if text and left > 0:
                texts.append(text)
                left -= len(content)
    return texts


def _tokenize(documents: list[tuple[str, bool]], codec: Codec, folder: Path) -> None:
    """Writes shards beside `folder` and moves them there, so that two runs at once do not collide."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{PARTIAL}")
    with naming(partial):
        partial.mkdir(parents=True)
    try:
        writers = {split: SplitWriter(partial, split, codec) for split in ("train", "validation")}
        for start in range(0, len(documents), BATCH):
            batch = documents[start : start + BATCH]
            for (text, held_out), ids in zip(
                batch, codec.encode_batch([text for text, _ in batch]), strict=True
            ):
                writers["validation" if held_out else "train"].add(ids, len(text.encode("utf-8")))
        for writer in writers.values():
            writer.finish_shard()
        splits = {split: writer.shards for split, writer in writers.items()}
        tokenizer = {"spec": "of the run that made this", "kind": type(codec).__name__}
        write_json(partial / MANIFEST, manifest(codec, tokenizer, splits, sources=["embedded"]))
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / MANIFEST).is_file():  # else another run was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
