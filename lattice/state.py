"""Everything a checkpoint holds, and how it is put back.

Tensors: weights and optimizer state, on many ranks as each holds them; a checkpoint loads on any number of
ranks in any layout. Facts: the step, from which the schedule, the data position and every draw follow, what
the summary needs of the steps before, and a random state. Nothing in training draws from the global
generators, so one state does for all ranks: rank 0's, for a component that draws from them nevertheless.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

from lattice.assemble import TrainingGraph
from lattice.model import LanguageModel


def tensors(graph: TrainingGraph) -> dict[str, Any]:
    """Views of the live tensors, by name; loading into them changes the graph, but for the optimizer's."""
    return {"model": weights(graph.model), "optimizer": _optimizer(graph)["state"]}


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Live parameters and buffers by name, a tied one once; of sharded ones the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gathered, its parameters are copies, perhaps rounded ones
            module.reshard()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _optimizer(graph: TrainingGraph) -> dict[str, Any]:
    """The optimizer's state by parameter name. A parameter that no gradient has reached has none yet; here it
    has what its first step starts from: zeros."""
    found: dict[str, Any] = get_optimizer_state_dict(graph.model, graph.optimizer)
    state, parameters = found["state"], dict(graph.model.named_parameters())
    like: dict[str, torch.Tensor] = next(iter(state.values()), {})
    for name in (name for group in found["param_groups"] for name in group["params"] if name not in state):
        state[name] = {
            key: torch.zeros_like(parameters[name].detach() if value.ndim else value)
            for key, value in like.items()
        }
    return found


def facts(graph: TrainingGraph, step: int, seconds: float) -> dict[str, Any]:
    """`step` steps are done, in `seconds`."""
    random = {"cpu": torch.get_rng_state()}
    if graph.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(graph.device)
    return {
        "step": step,
        "tokens": step * graph.recipe.run.batch_tokens,
        "seconds": seconds,
        "seed": graph.recipe.run.seed,
        "data": graph.source.position(step),
        "random": {name: base64.b64encode(bytes(state.numpy())).decode() for name, state in random.items()},
    }


def resume(graph: TrainingGraph) -> dict[str, Any] | None:
    """Puts the newest good checkpoint back, if there is one, and returns its facts.

    Raises ValueError where the checkpoint is of another model or of other data.
    """
    model, optimizer = weights(graph.model), _optimizer(graph)
    found = graph.checkpointer.load_latest({"model": model, "optimizer": optimizer["state"]})
    if found is None:
        graph.optimizer.state.clear()  # asking for its state has taken a step, with gradients of zero
        return None
    path, loaded = found
    here = graph.source.position(loaded["step"])
    if loaded["data"] != here:
        raise ValueError(
            f"{path} was made with other data: it stands at {loaded['data']}, the recipe's data at {here}. "
            "Restore the data, or start a new run with --out"
        )
    set_optimizer_state_dict(graph.model, graph.optimizer, optimizer)
    _put_back(loaded.get("random", {}), graph.device)
    return loaded


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
