"""Memory that tensors hold, followed as a computation runs. Needs torch alone."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Label = Callable[[Tensor], str]


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive: of `known` tensors, and of all that come out of an operation
    while the mode is active. Each is counted under the name that `label` gives its first tensor."""

    def __init__(self, known: Iterable[Tensor] = (), label: Label = lambda tensor: "other") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._label = label
        self._number: dict[int, int] = {}
        self._size: list[int] = []
        self._name: list[str] = []
        self._events: list[tuple[int, bool]] = []
        self._at_peak = 0
        self._notice(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for three times as often as all else together
        out = func(*args, **(kwargs or {}))
        self._notice(leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor))
        return out

    def rename(self, tensors: Iterable[Tensor], name: str) -> None:
        """Counts their storages, alive now, under another name, from their first moment on."""
        for tensor in tensors:
            self._name[self._number[tensor.untyped_storage()._cdata]] = name

    def at_peak(self) -> Counter[str]:
        """Bytes under each name when there were the most."""
        alive = set[int]()
        for number, born in self._events[: self._at_peak]:
            (alive.add if born else alive.remove)(number)
        bytes_of: Counter[str] = Counter()
        for number in alive:
            bytes_of[self._name[number]] += self._size[number]
        return bytes_of

    def _notice(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._number:
                continue
            number = self._number[key] = len(self._size)
            self._size.append(storage.nbytes())
            self._name.append(self._label(tensor))
            self._events.append((number, True))
            self.live += self._size[number]
            weakref.finalize(storage, self._forget, key)
        if self.live > self.peak:
            self.peak, self._at_peak = self.live, len(self._events)

    def _forget(self, key: int) -> None:
        number = self._number.pop(key)
        self._events.append((number, False))
        self.live -= self._size[number]
