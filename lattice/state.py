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
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

from lattice import optimizer_state
from lattice.assemble import TrainingGraph
from lattice.model import LanguageModel
from lattice.protocols import kind_of
from lattice.sharded import local


def tensors(graph: TrainingGraph) -> dict[str, Any]:
    """Views of the live tensors, by name: weights, and the optimizer's state of those parameters that it has
    one of."""
    model = weights(graph.model)  # first: the optimizer knows sharded parameters alone
    # Asked for the state of an optimizer that has none, torch would take a step.
    state = _optimizer(graph)["state"] if graph.optimizer.state else {}
    return {"model": model, "optimizer": state}


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
    """The optimizer's state by parameter name. Where it has none at all torch takes a step, with gradients
    and a learning rate of zero, which may change the weights nevertheless."""
    found: dict[str, Any] = get_optimizer_state_dict(graph.model, graph.optimizer)
    return found


def not_finite(model: LanguageModel) -> list[str]:
    """Names of the parameters that are trained of which something, here, is no number or infinite."""
    named = [(name, local(one)) for name, one in _parameters(model).items() if one.requires_grad]
    if not named:
        return []
    # On a GPU one answer for all of them, for which training waits once.
    finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()
    return [name for (name, _), holds in zip(named, finite, strict=True) if not holds]


def facts(
    graph: TrainingGraph,
    step: int,
    *,
    seconds: float,
    peak_memory_mib: float,
    earlier_ends: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """`step` steps are done, in `seconds`, with so much memory at most. `earlier_ends`: after which steps the
    run was given another number of steps, and how many it had until then."""
    random = {"cpu": torch.get_rng_state()}
    if graph.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(graph.device)
    return {
        "step": step,
        "steps": graph.recipe.run.steps,
        "earlier_ends": list(earlier_ends),
        "tokens": step * graph.recipe.run.batch_tokens,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib,
        "seed": graph.recipe.run.seed,
        "tokenizer": graph.codec.fingerprint,
        "data": _position(graph, step),
        "groups": _moved(graph),
        "without_state": [
            name for name, one in _parameters(graph.model).items() if one not in graph.optimizer.state
        ],
        "random": {name: base64.b64encode(bytes(state.numpy())).decode() for name, state in random.items()},
    }


def resume(graph: TrainingGraph) -> dict[str, Any] | None:
    """Puts the newest good checkpoint back, if there is one, and returns its facts.

    Raises ValueError where the checkpoint is of another model or of other data, and for what no checkpoint
    could hold.
    """
    optimizer: dict[str, Any] = {}

    def held(loaded: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint with these facts holds."""
        model = weights(graph.model)
        optimizer.update(_optimizer(graph))
        without = loaded.get("without_state", [])
        state = {name: value for name, value in optimizer["state"].items() if name not in without}
        return {"model": model, "optimizer": state}

    found = graph.checkpointer.load_latest(held)
    if found is None:
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
    parameters = _parameters(graph.model)
    for name in loaded.get("without_state", []):
        # It begins with the first gradient, as it would have.
        graph.optimizer.state.pop(parameters[name], None)
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


def check_state(graph: TrainingGraph) -> None:
    """After a step: raises ValueError for a state of the optimizer that no checkpoint could hold."""
    kind = kind_of(graph.recipe.component("optimizer"))
    optimizer_state.check_state(kind, graph.optimizer, _parameters(graph.model))


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
