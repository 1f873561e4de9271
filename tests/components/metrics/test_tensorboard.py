from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lattice.components.metrics.tensorboard import TensorBoard


@pytest.fixture
def board(tmp_path: Path) -> Any:
    """Reads back what was written: tag -> {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> dict[str, dict[int, Any]]:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        curves: dict[str, dict[int, Any]] = {}
        for tag in events.Tags()["scalars"]:
            curves[tag] = {point.step: point.value for point in events.Scalars(tag)}
        for tag in events.Tags()["tensors"]:
            curves[tag] = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)}
        return curves

    return read


def test_numbers_lists_and_texts(tmp_path: Path, board: Any) -> None:
    writer = TensorBoard().build(tmp_path, 0)
    writer.log(
        3,
        {
            "loss": 2.5,
            "residuals": torch.tensor([0.5, 0.25]),
            "nested": [[1, 2], [3]],
            "groups": {"a": np.float32(1.5)},
            "flag": True,
            "sample": "Once upon",
            "nothing": None,
        },
    )
    writer.close()
    curves = board()
    assert curves.pop("sample/text_summary") == {3: "Once upon"}
    assert curves == {
        "loss": {3: 2.5},
        "residuals/0": {3: 0.5},
        "residuals/1": {3: 0.25},
        "nested/0/0": {3: 1.0},
        "nested/0/1": {3: 2.0},
        "nested/1/0": {3: 3.0},
        "groups/a": {3: 1.5},
        "flag": {3: 1.0},
    }


def test_a_resumed_run_overwrites(tmp_path: Path, board: Any) -> None:
    for first, last, value in ((0, 10, 1.0), (6, 8, 2.0)):
        if first:  # files are read in the order of their names, which tell times to the second
            time.sleep(1.0)
        writer = TensorBoard().build(tmp_path, first)
        for step in range(first, last):
            writer.log(step, {"loss": value})
        writer.close()
    assert board()["loss"] == {**dict.fromkeys(range(6), 1.0), 6: 2.0, 7: 2.0}


def test_every_thins_curves_but_not_what_is_rare(tmp_path: Path, board: Any) -> None:
    writer = TensorBoard(every=10).build(tmp_path, 0)
    for step in range(25):
        writer.log(step, {"loss": step})
    writer.log(24, {"validation": 1.0})
    writer.close()
    assert list(board()["loss"]) == [0, 10, 20]
    assert board()["validation"] == {24: 1.0}


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    writer = TensorBoard().build(tmp_path, 0)
    with pytest.raises(TypeError, match=r"^stuff/0 is a object"):
        writer.log(0, {"stuff": [object()]})
    writer.close()


def test_every_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^every = 0: must be 1 or more"):
        TensorBoard(every=0)
