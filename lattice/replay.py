"""Passes over one token of each row, recorded as CUDA graphs. Decoding is many of them, and a GPU takes a
fifth of the time for their kernels that Python takes to launch them (docs/performance.md).

A graph is the same kernels on the same memory at every call, so what differs from token to token lies in
tensors: its slots, their rotary tables, where keys and values are written, which slots are seen. Layers get
the whole buffers of a cache, with room for slots that are not there yet; the mask leaves those out.

Shapes: B batch, n stages of the token, r of them read, D hidden, K slots for which a cache has room.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lattice.layers import Layers
from lattice.linear import Linear
from lattice.transient import product_dtype

if TYPE_CHECKING:
    from lattice.cache import Room
    from lattice.decoder import AttentionMask, Block, Rotary

AFTER = 4
"""Passes over a cache before one is recorded, which takes about as long as so many of them."""


class OneToken(NamedTuple):
    """What a pass over one token of each row is given."""

    slots_B1nD: Tensor
    rotary: Rotary
    mask: AttentionMask
    read: slice
    """The stages that are read."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.slots_B1nD, *self.rotary


class Replays:
    """The recorded passes over a cache."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._hooks: dict[tuple[Any, ...], list[Any] | None] = {}
        self._weights: dict[tuple[int, torch.dtype], dict[str, Tensor]] = {}
        self._aside: Any = None
        self._passes = 0

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        """A copy of a cache lies elsewhere in memory: nothing is recorded of it yet."""
        return Replays, ()

    @property
    def recorded(self) -> int:
        """How many passes are recorded now."""
        return len(self._recorded)

    def run(self, layers: Layers, given: OneToken, find_room: Callable[[], Room | None]) -> Tensor | None:
        """What the layers give, (B, 1, r, D); None where they are to be called as they are written."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not recording_on(given.slots_B1nD.device) or (room := find_room()) is None:
            return None
        read = range(given.slots_B1nD.shape[2])[given.read]
        key = id(room.buffers[0]), len(layers.blocks), layers.norm is None, room.size, read
        if not self._recordable(key, layers, given):
            return None
        self._passes += 1
        if self._passes <= AFTER:
            return None
        recorded = self._recorded.get(key)
        if recorded is None or not recorded.fits(given, room):
            self._recorded.pop(key, None)
            try:
                recorded = _Recorded(layers, given, room, self._cast, self._memory(given))
            except RuntimeError as error:
                self._hooks[key] = None
                reason = str(error).partition("\n")[0]
                warnings.warn(f"decoding goes on without CUDA graphs, slower: {reason}", stacklevel=2)
                return None
            self._recorded[key] = recorded
        hidden_B1rD = recorded(given, room)
        room.written()
        return hidden_B1rD

    def _recordable(self, key: tuple[Any, ...], layers: Layers, given: OneToken) -> bool:
        """Whether such a pass is the same operations for every token, and nothing else besides."""
        if given.mask.causal or given.mask.blocks is not None:
            return False
        if key not in self._hooks:
            self._hooks[key] = _hooks(layers, given.slots_B1nD.device)
        hooks = self._hooks[key]
        return hooks is not None and not any(hooks)

    def _memory(self, given: OneToken) -> Any:
        """What all recordings share: none runs while another's output is still needed."""
        if self._aside is None:
            self._aside = memory(given.slots_B1nD.device)
        return self._aside

    def _cast(self, block: Block, dtype: torch.dtype) -> Callable[..., Tensor]:
        """The layer with its linears' weights in `dtype`, as autocast would cast them at every call."""
        key = id(block), dtype
        if key not in self._weights:
            self._weights[key] = {
                f"{name}.{part}": weight.detach().to(dtype)
                for name, module in block.named_modules()
                if type(module) in (nn.Linear, Linear)
                for part, weight in module.named_parameters(recurse=False)
                if weight.dtype != dtype
            }
        weights = self._weights[key]
        return (lambda *inputs: functional_call(block, weights, inputs)) if weights else block


class _Recorded:
    """A pass, and the tensors that it reads and writes."""

    def __init__(
        self,
        layers: Layers,
        given: OneToken,
        room: Room,
        cast: Callable[..., Callable[..., Tensor]],
        aside: Any,
    ) -> None:
        slots_B1nD, rotary, mask, read = given
        device, self._dtype = slots_B1nD.device, product_dtype(slots_B1nD)
        self._capacity = room.capacity
        self._at_n = torch.arange(room.size, device=device)
        # To be added to the scores: of booleans attention would make that anew in each layer.
        size = len(slots_B1nD), 1, room.size, room.capacity
        self._unseen_B1nK = torch.full(size, -torch.inf, dtype=self._dtype, device=device)
        self._inputs = tuple(tensor.clone() for tensor in given.tensors)
        self._set(given, room)
        caches, called = room.fixed(self._at_n), partial(cast, dtype=self._dtype)
        for block in layers.blocks:  # here, not aside: torch frees a weight for the stream that made it
            called(block)

        def compute() -> Tensor:
            slots_B1nD, *tables = self._inputs
            seen = replace(mask, allowed=self._unseen_B1nK)
            # What autocast keeps of its casts is gone when it ends, and the graph would go on to read it.
            with _no_casts_kept(device):
                return layers(slots_B1nD, type(rotary)(*tables), seen, caches, read=read, called=called)

        self._replay, self._hidden_B1rD = record(compute, aside)

    def fits(self, given: OneToken, room: Room) -> bool:
        pairs = zip(self._inputs, given.tensors, strict=True)
        alike = all(one.shape == other.shape and one.dtype == other.dtype for one, other in pairs)
        return alike and room.capacity == self._capacity and product_dtype(given.slots_B1nD) == self._dtype

    def __call__(self, given: OneToken, room: Room) -> Tensor:
        self._set(given, room)
        self._replay()
        return self._hidden_B1rD.clone()

    def _set(self, given: OneToken, room: Room) -> None:
        for mine, other in zip(self._inputs, given.tensors, strict=True):
            mine.copy_(other)
        torch.arange(room.at, room.at + room.size, out=self._at_n)
        there_B1nK = self._unseen_B1nK[..., : room.length]
        if given.mask.allowed is None:
            there_B1nK.zero_()
        else:
            there_B1nK.fill_(-torch.inf).masked_fill_(given.mask.allowed, 0)


def recording_on(device: torch.device) -> bool:
    """Whether passes are recorded on such a device."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Aside(NamedTuple):
    """Where graphs are recorded, and their memory."""

    stream: torch.cuda.Stream
    pool: Any


def memory(device: torch.device) -> Aside:
    with torch.cuda.device(device):
        return Aside(torch.cuda.Stream(), torch.cuda.graph_pool_handle())  # type: ignore[no-untyped-call]


def record(compute: Callable[[], Tensor], aside: Aside) -> tuple[Callable[[], None], Tensor]:
    """What does the same again, and the tensor that then holds what comes out."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(aside.stream.device):
        before = torch.cuda.current_stream()
        try:
            aside.stream.wait_stream(before)
            with torch.cuda.stream(aside.stream):
                compute()  # what libraries set up at a first call is not to be recorded
            before.wait_stream(aside.stream)
            # Other threads may go on to use the GPU.
            with torch.cuda.graph(graph, aside.pool, aside.stream, capture_error_mode="thread_local"):
                out = compute()
        finally:
            torch.cuda.set_stream(before)  # torch leaves the other one behind where recording fails
    return graph.replay, out


def _no_casts_kept(device: torch.device) -> torch.autocast:
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )


def _hooks(layers: Layers, device: torch.device) -> list[Any] | None:
    """The hooks that modules have or may get, which a graph would leave out; None where the layers cannot be
    recorded: they are not made for it, or their weights lie elsewhere or are not whole."""
    modules = [module for part in (*layers.blocks, layers.norm) if part for module in part.modules()]
    weights = [weight for module in modules for weight in module.parameters(recurse=False)]
    if not all(block.recordable for block in layers.blocks):
        return None
    if any("forward" in vars(module) for module in modules):  # not the class's: accelerate's, say
        return None
    if any(type(weight) is not nn.Parameter or weight.device != device for weight in weights):
        return None
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
