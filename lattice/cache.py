"""Keys and values indexed by slot: for decoding, for prefill, and for solvers that sweep over stages.

A pass writes the keys and values of its slots; slots that were written before are replaced. Filled under
autograd, gradients flow through every key that was read, fresh or stale.

Shapes: B batch, H key/value heads, S slots, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lattice.one_row import kept_dtype
from lattice.replay import Replays
from lattice.slots import Slots

Pair = tuple[Tensor, Tensor]
F = TypeVar("F", bound=Callable[..., Any])


def _eager(call: F) -> F:
    """Left out of the graphs of a compiled layer: what a cache holds changes from call to call."""
    left_out = torch.compiler.disable(call)  # type: ignore[no-untyped-call]

    @wraps(call)
    def chosen(*arguments: Any) -> Any:
        # Where nothing is compiled, torch's wrapper would cost decoding microseconds a layer.
        return (left_out if torch.compiler.is_compiling() else call)(*arguments)

    return cast("F", chosen)


class LayerCache(Protocol):
    """What one pass sees of the keys and values of one layer."""

    def append(self, keys_BHSE: Tensor, values_BHSE: Tensor) -> Pair:
        """Writes those of the pass's own slots; returns those of all slots."""
        ...


class Segment(NamedTuple):
    """Slots that one pass writes: some stages, from first_stage on, of tokens first .. stop - 1."""

    first: int
    stop: int
    first_stage: int
    stages: int

    @property
    def size(self) -> int:
        return (self.stop - self.first) * self.stages


class KVCache:
    """The keys and values of all layers, and the slots they belong to.

    `gradients` keeps what autograd needs; without it they lie in buffers that are written in place.
    """

    def __init__(self, num_layers: int, *, gradients: bool = False, replays: Replays | None = None) -> None:
        self._layers = [_Pieces() if gradients else _Buffer() for _ in range(num_layers)]
        self.replays = replays or Replays()
        self._gradients = gradients
        self._starts: dict[Segment, int] = {}
        self._stages: dict[tuple[int, int], int] = {}
        self._later: dict[int, KVCache] = {}
        self._held_B: Tensor | None = None
        self.slots: Slots | None = None
        self.state: dict[str, Tensor] = {}
        """What a recurrence besides keys and values carries from token to token, by name; rows first."""

    @property
    def tokens(self) -> int:
        """Tokens cached so far."""
        return 0 if self.slots is None else self.slots.stop

    @property
    def rows(self) -> int | None:
        """Rows of the batch that it holds; None as long as it holds none."""
        held = (layer.read(0, 0) for layer in self._layers)
        return next((len(pair[0]) for pair in held if pair is not None), None)

    @property
    def segments(self) -> int:
        """How many passes added slots; with a segment it determines which slots are there."""
        return len(self._starts)

    @property
    def numbers(self) -> int:
        """Numbers held: keys and values of all layers and passes, and a recurrence's state, of all rows."""
        mine = sum(layer.numbers for layer in self._layers)
        mine += sum(tensor.numel() for tensor in self.state.values())
        return mine + sum(later.numbers for later in self._later.values())

    def of_pass(self, index: int) -> KVCache:
        """The keys and values of the index-th pass over the same slots, for a recurrence that sends a slot
        through the layers several times, each time with other inputs. Pass 0 is this cache itself."""
        if index == 0:
            return self
        if index not in self._later:
            self._later[index] = KVCache(len(self._layers), gradients=self._gradients, replays=self.replays)
        return self._later[index]

    def holds(self, segment: Segment) -> bool:
        return segment in self._starts

    def place(self, segment: Segment, slots: Slots) -> Slots:
        """Makes room for a pass over `slots`, or finds the room they have; returns all slots.

        Tokens come in order, and so do the stages of the same tokens. Raises ValueError for slots that
        overlap others, or leave a gap: those of a cache of another layout.
        """
        if segment in self._starts:
            assert self.slots is not None
            return self.slots
        tokens = (segment.first, segment.stop)
        expected = self._stages.get(tokens, 0)
        if segment.first_stage != expected or (not expected and segment.first != self.tokens):
            raise ValueError(
                f"a cache of another layout: it holds {self.tokens} tokens, and {expected} stages of tokens "
                f"{segment.first} to {segment.stop - 1}; slots of stage {segment.first_stage} cannot follow"
            )
        self._starts[segment] = 0 if self.slots is None else len(self.slots.stage_S)
        self._stages[tokens] = segment.first_stage + segment.stages
        self.slots = slots if self.slots is None else self.slots.followed_by(slots)
        return self.slots

    def layers(self, segment: Segment, start: int, stop: int | None) -> list[LayerCache]:
        """For a pass of layers [start, stop) over a segment that has its place."""
        at = self._starts[segment]
        return [layer.opened(at, segment.size, self._held_B) for layer in self._layers[start:stop]]

    def room(self, segment: Segment, start: int, stop: int | None) -> Room | None:
        """For a pass of layers [start, stop) over a token that has its place, where their buffers have room
        for it; None where they do not, or are not alike."""
        if segment.stop - segment.first != 1 or self._held_B is not None:
            return None
        at, buffers = self._starts[segment], list[_Buffer]()
        for layer in self._layers[start:stop]:
            if not isinstance(layer, _Buffer):
                return None
            buffers.append(layer)
        if len({(buffer.length, buffer.capacity) for buffer in buffers}) != 1:
            return None
        room = Room(buffers, at, segment.size)
        return room if room.length <= room.capacity else None

    def hold(self, rows_B: Tensor | None) -> None:
        """From now on, keys and values of these rows (True) that are there are not replaced."""
        self._held_B = rows_B

    def repeat(self, source: KVCache, segment: Segment, start: int, stop: int | None) -> None:
        """Gives layers [start, stop) the keys and values of a segment that they have in `source`."""
        assert source.slots is not None
        at, size = source._starts[segment], segment.size
        if segment not in self._starts:
            queries = source.slots.part(at, at + size, segment.stop)
            self.place(segment, queries)
        for mine, layer in zip(self.layers(segment, start, stop), source._layers[start:stop], strict=True):
            if (pair := layer.read(at, size)) is not None:
                mine.append(*pair)

    def real_tokens(self) -> Tensor | None:
        """(B,): how many tokens of each row are no padding; None where nothing was padded."""
        if self.slots is None or self.slots.real_BS is None:
            return None
        return torch.sum(self.slots.real_BS & (self.slots.stage_S == 0), dim=1)


def _keep(held_B: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if held_B is None else torch.where(held_B[:, None, None, None], old, new)


class _Buffer:
    """One layer's keys and values, in memory that doubles when it is full."""

    def __init__(self) -> None:
        self._keys_BHSE: Tensor | None = None
        self._values_BHSE: Tensor | None = None
        self.length = 0
        """Slots that it holds."""

    @property
    def capacity(self) -> int:
        """Slots for which there is room."""
        return 0 if self._keys_BHSE is None else self._keys_BHSE.shape[2]

    def opened(self, start: int, size: int, held_B: Tensor | None) -> LayerCache:
        return _BufferAt(self, start, held_B)

    @property
    def numbers(self) -> int:
        pair = self.read(0, self.length)
        return 0 if pair is None else pair[0].numel() + pair[1].numel()

    def read(self, start: int, size: int) -> Pair | None:
        if self._keys_BHSE is None or self._values_BHSE is None or start + size > self.length:
            return None
        at = slice(start, start + size)
        return self._keys_BHSE[:, :, at], self._values_BHSE[:, :, at]

    def write(self, start: int, held_B: Tensor | None, keys_BHSE: Tensor, values_BHSE: Tensor) -> Pair:
        size = keys_BHSE.shape[2]
        if held_B is not None and (old := self.read(start, size)) is not None:
            keys_BHSE, values_BHSE = _keep(held_B, old[0], keys_BHSE), _keep(held_B, old[1], values_BHSE)
        self.length = max(self.length, start + size)
        self._keys_BHSE = _room(self._keys_BHSE, keys_BHSE, self.length)
        self._values_BHSE = _room(self._values_BHSE, values_BHSE, self.length)
        self._keys_BHSE[:, :, start : start + size] = keys_BHSE
        self._values_BHSE[:, :, start : start + size] = values_BHSE
        return self._keys_BHSE[:, :, : self.length], self._values_BHSE[:, :, : self.length]

    def fixed(self, at_S: Tensor) -> LayerCache:
        assert self._keys_BHSE is not None
        assert self._values_BHSE is not None
        return _FixedAt(self._keys_BHSE, self._values_BHSE, at_S)


class Room(NamedTuple):
    """Buffers that have room for the slots of a pass, all alike."""

    buffers: Sequence[_Buffer]
    at: int
    """Where the first of them is written."""
    size: int

    @property
    def capacity(self) -> int:
        return self.buffers[0].capacity

    @property
    def length(self) -> int:
        """Slots that are there, with these."""
        return max(self.buffers[0].length, self.at + self.size)

    def fixed(self, at_S: Tensor) -> list[LayerCache]:
        """Of these layers: slots are written where the tensor says, and the whole buffer is returned. Those
        are the same operations on the same memory wherever the slots are."""
        return [buffer.fixed(at_S) for buffer in self.buffers]

    def written(self) -> None:
        """The slots are there now."""
        length = self.length
        for buffer in self.buffers:
            buffer.length = length


class _FixedAt(NamedTuple):
    keys_BHSE: Tensor
    values_BHSE: Tensor
    at_S: Tensor

    def append(self, keys_BHSE: Tensor, values_BHSE: Tensor) -> Pair:
        self.keys_BHSE.index_copy_(2, self.at_S, keys_BHSE.to(self.keys_BHSE.dtype))
        self.values_BHSE.index_copy_(2, self.at_S, values_BHSE.to(self.values_BHSE.dtype))
        return self.keys_BHSE, self.values_BHSE


class _BufferAt(NamedTuple):
    buffer: _Buffer
    start: int
    held_B: Tensor | None

    @_eager
    def append(self, keys_BHSE: Tensor, values_BHSE: Tensor) -> Pair:
        return self.buffer.write(self.start, self.held_B, keys_BHSE, values_BHSE)


def _room(buffer: Tensor | None, like_BHSE: Tensor, needed: int) -> Tensor:
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    batch, heads, _, size = like_BHSE.shape
    # A recorded pass is given the room that is left as well. What it does not see must be numbers, too, and
    # attention's kernels want what they add to scores in rows of a multiple of 16 bytes.
    capacity = -(-2 * needed // 64) * 64
    grown = like_BHSE.new_zeros(batch, heads, capacity, size, dtype=kept_dtype(like_BHSE))
    if buffer is not None:
        grown[:, :, : buffer.shape[2]] = buffer
    return grown


class _Pieces:
    """One layer's keys and values as autograd made them, a piece for each segment, never written in place."""

    def __init__(self) -> None:
        self.pieces: dict[int, Pair] = {}

    def opened(self, start: int, size: int, held_B: Tensor | None) -> LayerCache:
        return _PiecesAt(self, start, held_B)

    @property
    def numbers(self) -> int:
        return sum(keys.numel() + values.numel() for keys, values in self.pieces.values())

    def read(self, start: int, size: int) -> Pair | None:
        return self.pieces.get(start)


class _PiecesAt:
    """A pass's view. It remembers what it found, so that a pass that is computed again in the backward pass
    (activation checkpointing) reads the same, whatever later passes have replaced."""

    def __init__(self, layer: _Pieces, start: int, held_B: Tensor | None) -> None:
        self._layer, self._start, self._held_B = layer, start, held_B
        self._found = layer.pieces

    @_eager
    def append(self, keys_BHSE: Tensor, values_BHSE: Tensor) -> Pair:
        if self._held_B is not None and (old := self._found.get(self._start)) is not None:
            keys_BHSE = _keep(self._held_B, old[0], keys_BHSE)
            values_BHSE = _keep(self._held_B, old[1], values_BHSE)
        pieces = {**self._found, self._start: (keys_BHSE, values_BHSE)}
        if self._layer.pieces is self._found:
            self._layer.pieces = pieces
        if len(pieces) == 1:
            return keys_BHSE, values_BHSE
        keys, values = zip(*(pieces[start] for start in sorted(pieces)), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)
