"""Opens a file for reading, decompressed by its name's ending."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSIONS = (".gz", ".xz", ".zst")
CHUNK = 1 << 18


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of `path`.

    Whatever goes wrong while reading is a ValueError that names the file: one that is cut short, too.
    """
    try:
        with _open(path) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(path), CHUNK))
    return path.open("rb", buffering=CHUNK)


class _Zstandard(io.RawIOBase):
    """A stream of zstandard frames.

    The library's own reader ends a truncated file without a word; this one raises EOFError.
    """

    def __init__(self, path: Path) -> None:
        self._chunks = self._decompress(path)
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = chunk
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    @staticmethod
    def _decompress(path: Path) -> Iterator[bytes]:
        import zstandard

        frame = None
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                while chunk:
                    # Long-range frames, as large corpora use, need more than the default window.
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                    try:
                        yield frame.decompress(chunk)
                    except zstandard.ZstdError as error:
                        raise EOFError(str(error)) from error
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the last zstandard frame is incomplete")
