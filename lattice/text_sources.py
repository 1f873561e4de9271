"""The texts of one source, format by format, in two steps.

`records(skip)` reads the records as they lie there, without the first `skip`, in order and in bounded memory
(a plain text file is one document, held whole). `text(record)` makes of each its text and its size in UTF-8
bytes; it needs nothing but the record, so that other processes can do it. Errors are ValueErrors that name
the place.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lattice.unpack import reading

PARQUET_ROWS = 1024


class Record(NamedTuple):
    """One document as it was read."""

    content: bytes | str
    number: int = 1
    """Of its line; for messages."""
    offset: int = 0
    """Bytes before it in the decompressed file."""


@dataclass(frozen=True)
class TextSource:
    """Something that holds documents."""

    name: str
    size: int | None
    """Bytes on disk; None for what is not a file."""

    @abstractmethod
    def records(self, skip: int) -> Iterator[Record]: ...

    def text(self, record: Record) -> tuple[str, int]:
        """As it stands: for formats whose reader gives text that is known to be UTF-8."""
        assert isinstance(record.content, str)
        return record.content, len(record.content.encode("utf-8"))


@dataclass(frozen=True)
class PlainText(TextSource):
    """One document a file."""

    def records(self, skip: int) -> Iterator[Record]:
        if skip:
            return
        with reading(Path(self.name)) as file:
            content = file.read()
        yield Record(content)

    def text(self, record: Record) -> tuple[str, int]:
        assert isinstance(record.content, bytes)
        return _decode(record.content, self.name, 0), len(record.content)


@dataclass(frozen=True)
class JsonLines(TextSource):
    """One JSON object a line; blank lines are no records."""

    key: str

    def records(self, skip: int) -> Iterator[Record]:
        offset = 0
        with reading(Path(self.name)) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    if skip:
                        skip -= 1
                    else:
                        yield Record(line, number, offset)
                offset += len(line)

    def text(self, record: Record) -> tuple[str, int]:
        where = f"{self.name}:{record.number}"
        assert isinstance(record.content, bytes)
        content = _decode(record.content, where, record.offset)
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON record: {error}") from error
        return _field(fields, self.key, where)


@dataclass(frozen=True)
class Parquet(TextSource):
    """One document a row."""

    key: str

    def records(self, skip: int) -> Iterator[Record]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.name) as file:
                if self.key not in file.schema_arrow.names:
                    raise ValueError(_missing(self.key, file.schema_arrow.names, self.name))
                yield from self._rows(file, skip)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.name} is no Parquet file that can be read: {error}") from error

    def _rows(self, file: Any, skip: int) -> Iterator[Record]:
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= skip:  # consumed as a whole: not even read
                row += rows
                continue
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[self.key]):
                for value in batch.column(self.key):
                    row += 1
                    if row > skip:
                        yield Record(self._value(value, row))

    def _value(self, value: Any, row: int) -> str:
        where = f"{self.name}: row {row}"
        try:
            return _field({self.key: value.as_py()}, self.key, where)[0]
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {self.key!r} is not UTF-8 at byte {error.start}") from error


@dataclass(frozen=True)
class HubDataset(TextSource):
    """A dataset of the Hugging Face hub, streamed."""

    key: str
    dataset: str
    config: str | None
    split: str

    def records(self, skip: int) -> Iterator[Record]:
        records = iter(self._open(skip))
        number = skip
        while True:
            number += 1
            where = f"{self.name}: record {number}"
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # the network, a damaged file, …
                raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
            yield Record(_field(record, self.key, where)[0])

    def _open(self, skip: int) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"source {self.name!r} is no file, and reading it as a Hugging Face dataset needs the "
                "package 'datasets': pip install 'lattice[hub]'"
            ) from error
        try:
            stream = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            return stream.skip(skip) if skip else stream
        except Exception as error:  # offline, no such dataset, no such configuration, …
            raise ValueError(
                f"source {self.name!r} is no file, and it cannot be had as a Hugging Face dataset "
                f"({type(error).__name__}: {error}). Check the name (owner/name or owner/name:config) and "
                "the network; without one, copy its .parquet or .jsonl files here and name those"
            ) from error


def _decode(content: bytes, name: str, offset: int) -> str:
    """`offset`: of `content` in the decompressed file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 at byte offset {offset + error.start} "
            f"(0x{content[error.start]:02x}: {error.reason}); convert it to UTF-8"
        ) from error


def _missing(key: str, existing: Any, where: str) -> str:
    keys = ", ".join(repr(name) for name in existing) or "none"
    return f"{where}: no key {key!r}; the keys are {keys}: choose one with --text-key"


def _field(record: Any, key: str, where: str) -> tuple[str, int]:
    """The record's text and its size in UTF-8 bytes."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be an object with the key {key!r}, not {type(record).__name__}")
    if key not in record:
        raise ValueError(_missing(key, record, where))
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key!r} must be a string, not {type(text).__name__}")
    try:
        return text, len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        problem = f"{where}: {key!r} holds half a surrogate pair at character {error.start}"
        raise ValueError(problem) from error
