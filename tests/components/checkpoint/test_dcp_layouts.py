"""Saved by any number of ranks in any layout, loaded by any other, bit by bit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import rank_processes
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import lattice
from lattice import state
from lattice.assemble import groups_of
from lattice.components.checkpoint.dcp import DcpCheckpoint
from lattice.hf.export import export
from lattice.recipe import Recipe, load_recipe

RECIPE = {
    "run": {"steps": 1, "batch_tokens": 8, "sequence_tokens": 8},
    "backbone": {
        "kind": "gpt_neox",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 36,
        "vocab_size": 257 + 32,  # by no number of ranks divisible
        "max_position_embeddings": 32,
    },
    "recurrence": {"kind": "latent_thoughts"},
}


@cache
def recipe(seed: int) -> Recipe:
    return load_recipe(RECIPE, [f"run.seed={seed}"])


def mesh(*sizes: int) -> Any:
    names = ("replicas", "shards") if len(sizes) == 2 else ("shards",)
    return torch.distributed.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def fully_shard(model: nn.Module, over: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.decoder.blocks:  # type: ignore[union-attr]
        fully_shard(layer, mesh=over, mp_policy=rounded)
    fully_shard(model, mesh=over, mp_policy=rounded)


def tensor_parallel(model: nn.Module, over: Any) -> None:
    """Matrices by rows and by columns in turn, vectors whole on each rank."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for number, (name, parameter) in enumerate(list(model.named_parameters())):
        placement = Shard(number // 2 % 2) if parameter.ndim == 2 else Replicate()
        module = model.get_submodule(name.rpartition(".")[0])
        sharded = distribute_tensor(parameter.detach(), over, [placement])
        module.register_parameter(name.rpartition(".")[2], nn.Parameter(sharded))


def tensor_then_fully_shard(model: nn.Module, size: int) -> None:
    over = mesh(size // 2, 2)
    tensor_parallel(model, over["shards"])
    fully_shard(model, over["replicas"])


LAYOUTS: dict[str, Callable[[nn.Module, int], None]] = {
    "ddp": lambda model, size: None,
    "fsdp": lambda model, size: fully_shard(model, mesh(size)),
    "hsdp": lambda model, size: fully_shard(model, mesh(2, size // 2)),
    "tensor": lambda model, size: tensor_parallel(model, mesh(size)),
    "tensor_fsdp": tensor_then_fully_shard,
}


def graph(folder: Path, seed: int, layout: str = "ddp", size: int = 1, *, extras: bool = True) -> Any:
    """What `lattice.state` sees of a training graph."""
    model = lattice.build_model(recipe(seed))
    if extras:
        torch.manual_seed(seed)
        model.extras = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)])  # fewer rows than ranks
    LAYOUTS[layout](model, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return SimpleNamespace(
        model=model,
        optimizer=optimizer,
        built_groups=groups_of(optimizer),
        device=torch.device("cpu"),
        checkpointer=DcpCheckpoint().build(folder),
        recipe=recipe(seed),
        codec=recipe(seed).component("tokenizer").build(None),
        source=SimpleNamespace(position=lambda step: {"step": step}),
    )


def step(one: Any) -> None:
    """Gradients that follow from each weight alone, so that every layout computes the same. The last module
    gets none."""
    for name, parameter in one.model.named_parameters():
        if not name.startswith("extras.1"):
            parameter.grad = parameter.detach() * 3 + 1
    one.optimizer.step()
    one.optimizer.zero_grad()


def whole(one: Any) -> dict[str, torch.Tensor]:
    """All of a graph's tensors as one process has them."""
    tensors = state.tensors(one)
    flat = {f"model.{name}": tensor for name, tensor in tensors["model"].items()}
    for name, values in tensors["optimizer"].items():
        flat |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    gathered = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in flat.items()}
    return {name: tensor.clone().contiguous() for name, tensor in gathered.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def save(one: Any, folder: Path) -> None:
    checkpointer = DcpCheckpoint().build(folder)
    torch.manual_seed(70 + (dist.get_rank() if dist.is_initialized() else 0))
    checkpointer.save(2, state.tensors(one), state.facts(one, 2, seconds=0.0, peak_memory_mib=0.0))
    checkpointer.wait()


def refused(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("something was unpickled")


UNPICKLING = ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load")


def loaded(folder: Path, saved: str, layout: str, size: int) -> Any:
    """A fresh run that goes on from what was saved, and holds it."""
    one = graph(folder / saved, 1, layout, size)
    with ExitStack() as stack:
        for name in (*UNPICKLING, "torch.distributed.distributed_c10d._unpickler"):
            stack.enter_context(mock.patch(name, refused))
        facts = state.resume(one)
    assert facts is not None
    assert facts["step"] == 2
    assert torch.initial_seed() == 70  # rank 0's random state
    assert_same(whole(one), load_file(folder / "after_2.safetensors"))
    return one


def save_and_load(rank: int, size: int, folder: Path, saves: list[str], loads: list[tuple[str, str]]) -> None:
    for layout in saves:
        one = loaded(folder, "alone", layout, size)
        if layout in ("fsdp", "hsdp"):  # leaves weights gathered, as rounded copies under the same names
            one.model(torch.zeros(1, 4, dtype=torch.int64))
            assert any(p.dtype == torch.bfloat16 for p in one.model.parameters())
        save(one, folder / layout)
    for saved, layout in loads:
        one = loaded(folder, saved, layout, size)
    if loads:
        step(one)
        torch.testing.assert_close(whole(one), load_file(folder / "after_3.safetensors"))
    else:
        save(graph(folder, 0, "fsdp", size, extras=False), folder / "run" / "checkpoints")


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (os.environ["BOMB"],)


def test_any_number_of_ranks_any_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    alone, plain = graph(tmp_path / "alone", 0), graph(tmp_path / "plain", 0)
    assert state.resume(alone) is None
    for number in (1, 2, 3):
        step(alone)
        step(plain)
        assert_same(whole(alone), whole(plain))  # looking for a checkpoint leaves no trace in the optimizer
        save_file(whole(alone), tmp_path / f"after_{number}.safetensors")
        if number == 2:
            save(alone, tmp_path / "alone")
    saves = list(LAYOUTS)
    rank_processes.run(save_and_load, 4, tmp_path, saves, [], folder=tmp_path)
    for name in ("alone", *saves):
        for bomb in (".metadata", "__0_0.distcp"):
            (tmp_path / name / "step-00000002" / bomb).write_bytes(pickle.dumps(Bomb()))
    loads = [("hsdp", "tensor"), ("tensor_fsdp", "fsdp")]
    rank_processes.run(save_and_load, 3, tmp_path, [], loads, folder=tmp_path)
    loads = [("tensor", "hsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")]
    rank_processes.run(save_and_load, 2, tmp_path, [], loads, folder=tmp_path)
    for name in saves:
        loaded(tmp_path, name, "ddp", 1)
    assert not (tmp_path / "exploded").exists()

    run = tmp_path / "run"  # saved sharded, it is evaluated and exported by one plain process
    (run / "recipe.toml").write_text(recipe(0).to_toml())
    expected = state.weights(lattice.build_model(recipe(0)))
    assert_same(state.weights(lattice.load(run)), expected)
    export(run, tmp_path / "hf")
    assert_same(state.weights(lattice.from_pretrained(tmp_path / "hf")), expected)
