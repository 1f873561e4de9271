from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lattice.components.checkpoint.dcp import CheckpointError, DcpCheckpoint


def trained_model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3)).to(torch.float32)
    model[1].to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": dict(model.named_parameters()),
        "optimizer": {"state": optimizer.state_dict()["state"]},
        "rng": {"cpu": torch.get_rng_state()},
    }


def copied(tensors: Any) -> Any:
    if isinstance(tensors, dict):
        return {key: copied(value) for key, value in tensors.items()}
    return tensors.detach().clone()


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_exact(tmp_path: Path, asynchronous: bool) -> None:
    tensors = state(*trained_model(0))
    expected = copied(tensors)
    checkpointer = DcpCheckpoint(asynchronous=asynchronous).build(tmp_path)
    checkpointer.save(7, tensors, {"step": 7, "recipe": {"lr": 0.1}, "text": "ä"})
    if asynchronous:
        checkpointer.wait()
    assert checkpointer.latest() == tmp_path / "step-00000007"

    other = state(*trained_model(1))
    into = other["model"]["1.weight"]
    facts = checkpointer.load(tmp_path / "step-00000007", other)
    assert facts == {"step": 7, "recipe": {"lr": 0.1}, "text": "ä"}
    assert_same(other, expected)
    assert into is other["model"]["1.weight"]  # filled in place


def test_odd_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "transposed": base.view(3, 4).t(),
        "tied": {"a": base, "b": base},
        "view": base[2:4],
        "bool": torch.tensor([True, False]),
        "int": torch.tensor([2**62]),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    checkpointer = DcpCheckpoint(asynchronous=False).build(tmp_path)
    checkpointer.save(1, tensors, {})
    other = {
        key: {n: torch.zeros_like(t) for n, t in v.items()} if isinstance(v, dict) else torch.zeros_like(v)
        for key, v in tensors.items()
    }
    loaded = checkpointer.load_latest(other)
    assert loaded is not None
    assert torch.equal(other.pop("nan"), tensors.pop("nan")) is False  # NaN is not equal to itself
    assert_same(other, tensors)


def test_large_states_are_split_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattice.components.checkpoint._tensors._FILE_BYTES", 100)
    tensors = {"model": {str(i): torch.full((20,), float(i)) for i in range(5)}}
    checkpointer = DcpCheckpoint().build(tmp_path)
    checkpointer.save(1, tensors, {})
    checkpointer.wait()
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) == 5
    other = {"model": {str(i): torch.zeros(20) for i in range(5)}}
    checkpointer.load_latest(other)
    assert_same(other, tensors)


def test_changing_the_tensors_after_save_does_not_tear(tmp_path: Path) -> None:
    tensors = {"model": {str(i): torch.zeros(500_000) for i in range(8)}, "step": torch.zeros(())}
    checkpointer = DcpCheckpoint().build(tmp_path)
    checkpointer.save(1, tensors, {})
    for _ in range(20):  # training goes on at once
        tensors["step"] += 1
        for tensor in tensors["model"].values():
            tensor += 1
    checkpointer.wait()
    checkpointer.load(tmp_path / "step-00000001", tensors)
    assert all(not tensor.any() for tensor in [*tensors["model"].values(), tensors["step"]])


def test_only_part_of_a_checkpoint_may_be_asked_for(tmp_path: Path) -> None:
    checkpointer = DcpCheckpoint(asynchronous=False).build(tmp_path)
    checkpointer.save(1, {"model": {"w": torch.ones(3)}, "model_ema": {"w": torch.ones(3)}}, {"step": 1})
    tensors = {"model": {"w": torch.zeros(3)}}
    assert checkpointer.load_latest(tensors) == (tmp_path / "step-00000001", {"step": 1})
    assert tensors["model"]["w"].all()


def test_another_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    checkpointer = DcpCheckpoint(asynchronous=False).build(tmp_path)
    checkpointer.save(1, {"model": {"w": torch.ones(3, 4), "b": torch.ones(3), "old": torch.ones(2)}}, {})
    tensors = {"model": {"w": torch.zeros(3, 5), "b": torch.zeros(3), "new": torch.zeros(1)}}
    expected = (
        r"^the checkpoint is of another model: "
        r"model\.w is \(3, 4\) float32 in the checkpoint and \(3, 5\) float32 here; "
        r"model\.new is missing in the checkpoint and \(1,\) float32 here; "
        r"model\.old is \(2,\) float32 in the checkpoint and missing here"
    )
    with pytest.raises(CheckpointError, match=expected):
        checkpointer.load_latest(tensors)
    assert not any(tensor.any() for tensor in tensors["model"].values())
    many = {"model": {str(i): torch.zeros(1) for i in range(50)}}
    with pytest.raises(CheckpointError, match="and 48 more"):
        checkpointer.load_latest(many)


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    checkpointer = DcpCheckpoint().build(tmp_path)
    with pytest.raises(TypeError, match=r"^optimizer\.step is a int, not a tensor"):
        checkpointer.save(1, {"optimizer": {"step": 3}}, {})
    with pytest.raises(ValueError, match=r"^two tensors have the name a\.b"):
        checkpointer.save(1, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, {})
    with pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, {"a": torch.ones(1)}, {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpointer = DcpCheckpoint(keep=2).build(tmp_path)
    assert checkpointer.latest() is None
    assert checkpointer.load_latest({}) is None
    for step in (1, 2, 10, 300_000_000):
        checkpointer.save(step, {"w": torch.full((2,), float(step))}, {"step": step})
    checkpointer.wait()
    kept = [tmp_path / "step-300000000", tmp_path / "step-00000010"]
    assert checkpointer.candidates() == kept
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_every_mth_one_is_kept_for_ever_beside_them(tmp_path: Path) -> None:
    checkpointer = DcpCheckpoint(every=5, keep=2, keep_every=20, asynchronous=False).build(tmp_path)
    for step in [*range(5, 60, 5), 57]:  # the last one when the run was interrupted
        checkpointer.save(step, {"w": torch.full((2,), float(step))}, {"step": step})
    assert [int(path.name[5:]) for path in checkpointer.candidates()] == [57, 55, 40, 20]


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    checkpointer = DcpCheckpoint(keep=1).build(tmp_path)
    for value in (1.0, 2.0):
        checkpointer.save(5, {"w": torch.full((2,), value)}, {"value": value})
    checkpointer.wait()
    tensors = {"w": torch.zeros(2)}
    assert checkpointer.load_latest(tensors) == (tmp_path / "step-00000005", {"value": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_coming_back_to_an_earlier_step_sets_later_ones_aside(tmp_path: Path) -> None:
    checkpointer = DcpCheckpoint(keep=1, asynchronous=False).build(tmp_path)
    checkpointer.save(20, {"w": torch.ones(2)}, {})
    with pytest.warns(UserWarning, match="step-00000020 is later than step 15"):
        checkpointer.save(15, {"w": torch.ones(2)}, {})
    assert checkpointer.candidates() == [tmp_path / "step-00000015"]
    assert (tmp_path / "abandoned-step-00000020" / "manifest.json").exists()


def test_nothing_warns(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpointer = DcpCheckpoint().build(tmp_path)
        checkpointer.save(1, {"w": torch.ones(2)}, {})
        checkpointer.wait()
        checkpointer.load_latest({"w": torch.ones(2)})


@pytest.mark.parametrize("option", ["every", "keep"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} = 0: must be 1 or more"):
        DcpCheckpoint(**{option: 0})


@pytest.mark.parametrize("steps", [-100, 0, 50, 250])
def test_keep_every_is_checked(steps: int) -> None:
    with pytest.raises(ValueError, match=f"^keep_every = {steps}: must be a multiple of every = 100"):
        DcpCheckpoint(every=100, keep_every=steps)
