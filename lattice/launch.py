"""How this process was launched: alone, or by torchrun as one of several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


class Agreed(ValueError):
    """Raised by all ranks alike: one on each host tells."""


class Elsewhere(ValueError):
    """Another rank failed, and tells."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A process's place among those that were launched together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its place on its own host."""
    local_size: int = 1
    attempt: int = 0
    """How often torchrun has restarted the processes."""

    @staticmethod
    def here(environment: Mapping[str, str] | None = None) -> Launch:
        """From the variables that torchrun sets. Raises ValueError, naming the variable, for one that is no
        number or does not fit the others."""
        given = os.environ if environment is None else environment
        size, local_size = _number(given, "WORLD_SIZE", 1), _number(given, "LOCAL_WORLD_SIZE", 1)
        return Launch(
            rank=_number(given, "RANK", 0, below=size),
            size=size,
            local_rank=_number(given, "LOCAL_RANK", 0, below=local_size),
            local_size=local_size,
            attempt=_number(given, "TORCHELASTIC_RESTART_COUNT", 0),
        )

    def tells(self, error: Exception) -> bool:
        """Whether an error is this process's to tell."""
        return not isinstance(error, Elsewhere) and (self.local_rank == 0 or not isinstance(error, Agreed))


def _number(environment: Mapping[str, str], name: str, default: int, below: int | None = None) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or (below is not None and int(text) >= below):
        limit = "" if below is None else f" below {below}"
        raise ValueError(
            f"environment variable {name} = '{text}': must be a number{limit}, as torchrun sets it"
        )
    return int(text)
