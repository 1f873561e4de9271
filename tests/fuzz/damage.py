"""Damage to bytes and to JSON values, as hypothesis draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

ODD = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",  # half a surrogate pair
    b"\xef\xbb\xbf",  # a byte order mark
    b"\r",
    b"\n",
    b"\\",
    b'"',
    b"[",
    b"]",
    b"{",
    b"}",
    b"-1",
    b"9" * 25,
    b"9" * 5000,  # more digits than Python reads
    b"1e999",
    b"[" * 3000,  # deeper than Python recurses
    b'{"a":' * 3000,
]
PATHS = ["", "..", "/dev/zero", "a\0b", "\ud800", "x" * 300]
"""Names that are no file's name, or of a file without end."""
Edit = Callable[[bytes], bytes]


def _at(content: bytes, share: float) -> int:
    return int(share * len(content))


def edits(tokens: Sequence[bytes]) -> st.SearchStrategy[Edit]:
    """One change of a file's bytes; `tokens` are pieces that mean something there."""
    share = st.floats(0, 1, exclude_max=True)
    size = st.integers(1, 12)
    piece = st.sampled_from([*tokens, *ODD]) | st.binary(min_size=1, max_size=4)

    def insert(at: float, what: bytes) -> Edit:
        return lambda c: c[: _at(c, at)] + what + c[_at(c, at) :]

    def replace(at: float, count: int, what: bytes) -> Edit:
        return lambda c: c[: _at(c, at)] + what + c[_at(c, at) + count :]

    def drop(at: float, count: int) -> Edit:
        return replace(at, count, b"")

    def copy(source: float, count: int, at: float) -> Edit:
        return lambda c: insert(at, c[_at(c, source) : _at(c, source) + 8 * count])(c)

    def flip(at: float, bit: int) -> Edit:
        def change(content: bytes) -> bytes:
            changed = bytearray(content or b"\x00")
            changed[_at(content, at)] ^= 1 << bit
            return bytes(changed)

        return change

    def cut(at: float) -> Edit:
        return lambda c: c[: _at(c, at)]

    return st.one_of(
        st.builds(insert, share, piece),
        st.builds(replace, share, size, piece),
        st.builds(drop, share, size),
        st.builds(copy, share, size, share),
        st.builds(flip, share, st.integers(0, 7)),
        st.builds(cut, share),
        st.builds(lambda what: lambda c: c + what, piece),
    )


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, tokens: Sequence[bytes] = ()) -> bytes:
    """`content` with one to four changes."""
    for edit in draw(st.lists(edits(tokens), min_size=1, max_size=4)):
        content = edit(content)
    return content


def values(strings: Sequence[str]) -> st.SearchStrategy[Any]:
    """What may stand in JSON in place of something else."""
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 1 << 70),
        st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**30]),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([*strings, *PATHS]),
    )
    keys = st.sampled_from([*strings, *PATHS]) | st.text(max_size=3)
    return st.recursive(
        plain, lambda one: st.lists(one, max_size=3) | st.dictionaries(keys, one, max_size=3), max_leaves=4
    )


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places replaced, removed or added."""
    strings = sorted(_strings(value))
    for _ in range(draw(st.integers(1, 3))):
        value = _replaced(draw, value, draw(values(strings)), strings)
    return value


def _strings(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {one for inner in value.values() for one in _strings(inner)}
    if isinstance(value, list):
        return {one for inner in value for one in _strings(inner)}
    return {value} if isinstance(value, str) else set()


def _replaced(draw: st.DrawFn, value: Any, new: Any, strings: Sequence[str]) -> Any:
    """Goes down to a random place and changes what is there."""
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(inner, dict) or not inner or draw(st.integers(0, 4)) == 0:
        return new
    key = draw(st.sampled_from(sorted(inner, key=str)))
    action = draw(st.sampled_from(["deeper"] * 4 + ["remove", "add"]))
    changed = dict(inner)
    if action == "remove":
        del changed[key]
    elif action == "add":
        changed[len(inner) if isinstance(value, list) else draw(st.sampled_from([*strings, *PATHS]))] = new
    else:
        changed[key] = _replaced(draw, inner[key], new, strings)
    return list(changed.values()) if isinstance(value, list) else changed
