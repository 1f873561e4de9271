"""Curves and texts for TensorBoard, in `tensorboard/` of the run directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattice.protocols import Metrics, MetricWriter
from lattice.registry import register

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@register("metrics", "tensorboard")
@dataclass(frozen=True, kw_only=True)
class TensorBoard(Metrics):
    """Curves and texts for TensorBoard."""

    every: int = 1
    """Steps between two points of a curve. What comes more seldom, such as evaluations, is all drawn."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every}: must be 1 or more")

    def build(self, folder: Path, first_step: int) -> MetricWriter:
        """What an earlier run in this folder drew from `first_step` on is taken back: a run that resumes
        from a checkpoint draws it again."""
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step, flush_secs=30)
        return _Writer(writer, self.every)


class _Writer(MetricWriter):
    def __init__(self, writer: SummaryWriter, every: int) -> None:
        self._writer = writer
        self._every = every
        self._drawn: dict[str, int] = {}

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers become points, strings texts; lists and dicts of them `name/0`, `name/key`; tensors and
        arrays count as lists, None as nothing. Raises TypeError for anything else."""
        for name, value in values.items():
            for leaf, content in _leaves(name, value):
                if step - self._drawn.get(leaf, step - self._every) >= self._every:
                    self._draw(leaf, content, step)

    def _draw(self, name: str, content: float | str, step: int) -> None:
        add = self._writer.add_text if isinstance(content, str) else self._writer.add_scalar
        add(name, content, step)
        self._drawn[name] = step

    def close(self) -> None:
        self._writer.close()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float | str]]:
    if hasattr(value, "tolist"):  # a tensor, or a number or array of NumPy
        value = value.tolist()
    if isinstance(value, (str, int, float)):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}/{index}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}/{key}", item)
    elif value is not None:
        raise TypeError(f"{name} is a {type(value).__name__}: TensorBoard is given numbers and texts")
