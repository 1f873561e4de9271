"""Everything a checkpoint holds, and how it is put back.

Tensors: weights, optimizer state and the random state. Facts: the step, from which the schedule, the data
position and every draw follow, and what the summary needs of the steps before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lattice.assemble import TrainingGraph
from lattice.model import LanguageModel


def tensors(graph: TrainingGraph) -> dict[str, Any]:
    """Views of the live tensors, by name; loading into them changes the graph, but for the optimizer's."""
    optimizer = get_optimizer_state_dict(graph.model, graph.optimizer)
    rng = {"cpu": torch.get_rng_state()}
    if graph.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(graph.device)
    return {"model": weights(graph.model), "optimizer": optimizer["state"], "rng": rng}


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Live parameters and buffers by name, a tied one once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def facts(graph: TrainingGraph, step: int, seconds: float) -> dict[str, Any]:
    """`step` steps are done, in `seconds`."""
    return {
        "step": step,
        "tokens": step * graph.recipe.run.batch_tokens,
        "seconds": seconds,
        "seed": graph.recipe.run.seed,
        "data": graph.source.position(step),
    }


def resume(graph: TrainingGraph) -> dict[str, Any] | None:
    """Puts the newest good checkpoint back, if there is one, and returns its facts.

    Raises ValueError where the checkpoint is of another model or of other data.
    """
    state = tensors(graph)
    found = graph.checkpointer.load_latest(state)
    if found is None:
        return None
    path, loaded = found
    here = graph.source.position(loaded["step"])
    if loaded["data"] != here:
        raise ValueError(
            f"{path} was made with other data: it stands at {loaded['data']}, the recipe's data at {here}. "
            "Restore the data, or start a new run with --out"
        )
    groups = get_optimizer_state_dict(graph.model, graph.optimizer)["param_groups"]
    optimizer = {"state": state["optimizer"], "param_groups": groups}
    set_optimizer_state_dict(graph.model, graph.optimizer, optimizer)
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], graph.device)
    return loaded
