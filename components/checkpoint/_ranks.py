"""What the ranks of a job tell each other about a checkpoint, so that all of them do and raise the same."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from lattice import messages
from lattice.components.checkpoint._manifest import CheckpointError, CorruptCheckpoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
LIMIT = timedelta(days=7)
"""A save takes as long as the disk does; who is gone or hangs is for lattice.watch to find."""
_KINDS = {kind.__name__: kind for kind in (CheckpointError, CorruptCheckpoint, OSError)}


class Ranks:
    """All ranks of the job; one where torch.distributed is not in use.

    They talk over a gloo group of their own, so that training may use the others meanwhile. Every method is
    called by all ranks, in the same order, by one thread of a rank at a time. Raises OSError where the ranks
    do not reach each other, and from then on at once: who asked on would wait for ranks that are elsewhere.
    """

    def __init__(self) -> None:
        self.group: ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=LIMIT)
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._lost = ""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        return [value] if self.group is None else self._talk(messages.gather, value)

    def first(self, value: Any) -> Any:
        """The value of rank 0."""
        return value if self.group is None else self._talk(messages.broadcast, value)

    def lost(self, error: Exception) -> OSError:
        """What is raised from now on, after `error` in a collective of this group."""
        self._lost = self._lost or f"the ranks do not reach each other: {error}"
        return OSError(self._lost)

    def _talk(self, collective: Callable[..., T], value: Any) -> T:
        if self._lost:
            raise OSError(self._lost)
        try:
            return collective(value, self.group)
        except RuntimeError as error:
            raise self.lost(error) from error

    def together(self, act: Callable[[], T]) -> T:
        """Every rank acts, and gets its own result. If one fails, all raise what the first to fail raised."""
        if self.group is None:
            return act()
        result, failure = _tried(act)
        failed = next((one for one in self.gather(_described(failure)) if one), None)
        if failed is not None:
            raise _rebuilt(failed) from failure
        return result  # type: ignore[return-value]

    def from_first(self, act: Callable[[], T]) -> T:
        """Rank 0 acts, and all get its result, which JSON can hold, or raise what it raised."""
        if self.group is None:
            return act()
        result, failure = _tried(act) if self.rank == 0 else (None, None)
        told = self.first([result, _described(failure)])
        if told[1] is not None:
            raise _rebuilt(told[1]) from failure
        answer: T = told[0]
        return answer


def _tried(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error


def _described(failure: Exception | None) -> list[Any] | None:
    """A kind and what it is made of."""
    if failure is None:
        return None
    if isinstance(failure, OSError) and failure.errno is not None:
        return ["OSError", failure.errno, failure.strerror, failure.filename and str(failure.filename)]
    name = type(failure).__name__
    return [name, str(failure)] if name in _KINDS else ["RuntimeError", f"{name}: {failure}"]


def _rebuilt(described: list[Any]) -> Exception:
    kind, *parts = described
    return _KINDS.get(kind, RuntimeError)(*parts)
