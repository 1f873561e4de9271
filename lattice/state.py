"""Everything a checkpoint holds, and how it is put back.

Tensors: weights and optimizer state, on many ranks as each holds them; a checkpoint loads on any number of
ranks in any layout. Facts: the step, from which the schedule, the data position and every draw follow, what
the summary needs of the steps before, the tokenizer's fingerprint, what an optimizer has changed in its
parameter groups, and a random state. Nothing in training draws from the global generators, so one state does
for all ranks: rank 0's, for a component that draws from them nevertheless.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

from lattice.assemble import TrainingGraph
from lattice.model import LanguageModel
from lattice.protocols import kind_of


def tensors(graph: TrainingGraph) -> dict[str, Any]:
    """Views of the live tensors, by name; loading into them changes the graph, but for the optimizer's."""
    return {"model": weights(graph.model), "optimizer": _optimizer(graph)["state"]}


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Live parameters and buffers by name, a tied one once; of sharded ones the shards."""
    named = [*_parameters(model).items(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _parameters(model: LanguageModel) -> dict[str, torch.nn.Parameter]:
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gathered, its parameters are copies, perhaps rounded ones
            module.reshard()
    return dict(model.named_parameters())


def _optimizer(graph: TrainingGraph) -> dict[str, Any]:
    """The optimizer's state by parameter name. A parameter that no gradient has reached has none yet; here it
    has what its first step starts from: zeros."""
    found: dict[str, Any] = get_optimizer_state_dict(graph.model, graph.optimizer)
    state, parameters = found["state"], _parameters(graph.model)
    like: dict[str, torch.Tensor] = next(iter(state.values()), {})
    for name in (name for group in found["param_groups"] for name in group["params"] if name not in state):
        state[name] = {
            key: torch.zeros_like(parameters[name].detach() if value.ndim else value)
            for key, value in like.items()
        }
    return found


def facts(graph: TrainingGraph, step: int, *, seconds: float, peak_memory_mib: float) -> dict[str, Any]:
    """`step` steps are done, in `seconds`, with so much memory at most."""
    random = {"cpu": torch.get_rng_state()}
    if graph.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(graph.device)
    return {
        "step": step,
        "tokens": step * graph.recipe.run.batch_tokens,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib,
        "seed": graph.recipe.run.seed,
        "tokenizer": graph.codec.fingerprint,
        "data": _position(graph, step),
        "groups": _moved(graph),
        "random": {name: base64.b64encode(bytes(state.numpy())).decode() for name, state in random.items()},
    }


def resume(graph: TrainingGraph) -> dict[str, Any] | None:
    """Puts the newest good checkpoint back, if there is one, and returns its facts.

    Raises ValueError where the checkpoint is of another model or of other data, and for what no checkpoint
    could hold.
    """
    model, optimizer = weights(graph.model), _optimizer(graph)
    _check_state(graph, optimizer["state"])
    found = graph.checkpointer.load_latest({"model": model, "optimizer": optimizer["state"]})
    if found is None:
        graph.optimizer.state.clear()  # asking for its state has taken a step, with gradients of zero
        _put_back_groups(graph, [])
        _position(graph, 0)
        return None
    path, loaded = found
    here = _position(graph, loaded["step"])
    if loaded["data"] != here:
        raise ValueError(
            f"{path} was made with other data: it stands at {loaded['data']}, the recipe's data at {here}. "
            "Restore the data, or start a new run with --out"
        )
    set_optimizer_state_dict(graph.model, graph.optimizer, optimizer)
    _put_back_groups(graph, loaded.get("groups", []))
    _put_back(loaded.get("random", {}), graph.device)
    return loaded


def _position(graph: TrainingGraph, step: int) -> dict[str, Any]:
    """Of the data, as a checkpoint tells it. Raises ValueError for what JSON cannot hold."""
    position = graph.source.position(step)
    try:
        told: dict[str, Any] = json.loads(json.dumps(position))
    except (TypeError, ValueError) as error:
        kind = kind_of(graph.recipe.component("data"))
        raise ValueError(f"data '{kind}': position is {position}; must be what JSON can hold") from error
    return told


def _check_state(graph: TrainingGraph, state: dict[str, Any], of: str = "") -> None:
    for name, value in state.items():
        if isinstance(value, dict):
            _check_state(graph, value, of or name)
        elif not isinstance(value, torch.Tensor):
            kind = kind_of(graph.recipe.component("optimizer"))
            raise ValueError(
                f"optimizer '{kind}': its state of {of} has '{name}', a {type(value).__name__}; must be a "
                "tensor, which a checkpoint can hold"
            )


def _moved(graph: TrainingGraph) -> list[dict[str, Any]]:
    """What the optimizer has changed in its parameter groups since they were built, but for the learning
    rate, which is the schedule's. A group is known by its parameters: how many there are depends on the
    ranks."""
    names = {parameter: name for name, parameter in _parameters(graph.model).items()}
    found = []
    for group, built in zip(graph.optimizer.param_groups, graph.built_groups, strict=True):
        values = {key: value for key, value in group.items() if key not in ("params", "lr")}
        moved = {key: value for key, value in values.items() if repr(value) != repr(built.get(key))}
        try:
            json.dumps(moved)
        except (TypeError, ValueError) as error:
            kind = kind_of(graph.recipe.component("optimizer"))
            raise ValueError(
                f"optimizer '{kind}': a step has changed its parameter groups to {moved}; must be what JSON "
                "can hold: keep tensors in its state"
            ) from error
        if moved:
            found.append({"parameters": [names[one] for one in group["params"]], "values": moved})
    return found


def _put_back_groups(graph: TrainingGraph, moved: list[dict[str, Any]]) -> None:
    """The groups as they were built, then what had been changed."""
    names = {parameter: name for name, parameter in _parameters(graph.model).items()}
    for group, built in zip(graph.optimizer.param_groups, graph.built_groups, strict=True):
        for key in group.keys() - built.keys() - {"params"}:
            del group[key]
        group.update(built)
        mine = {names[parameter] for parameter in group["params"]}
        for one in moved:
            if not mine.isdisjoint(one["parameters"]):
                group.update(one["values"])


def _put_back(random: dict[str, str], device: torch.device) -> None:
    """The random states that were saved, as far as this device has them."""
    states = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in random.items()
    }
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
