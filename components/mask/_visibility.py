"""What masks have in common: a sliding window, and whose thoughts are seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lattice.slots import Side


@dataclass(frozen=True, kw_only=True)
class Visibility:
    window: int | None = None
    """See the last n tokens alone, the query's own among them, padding not counted; all if not given."""
    thoughts: Literal["all", "own", "last"] = "all"
    """Of earlier tokens see all slots; "own": the token itself, its thoughts are seen by its own later slots
    alone; "last": its last thought alone."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}: must be at least 1")

    def visible(self, query: Side, key: Side) -> Tensor | None:
        """None where nothing is hidden."""
        parts = []
        if self.window is not None and self.window < key.stop:
            parts.append(query.position - key.position < self.window)
        if self.thoughts != "all" and key.last_stage > 0:
            stage = 0 if self.thoughts == "own" else key.last_stage
            parts.append((key.stage == stage) | (key.token == query.token))
        return both(*parts)


def both(*parts: Tensor | None) -> Tensor | None:
    """What all say; None where none says anything."""
    said = [part for part in parts if part is not None]
    if not said:
        return None
    result = said[0]
    for part in said[1:]:
        result = result & part
    return result
