"""What `lattice plan` shows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from lattice import options
from lattice.atomic import check_writable, naming
from lattice.communication import slots_to_hide
from lattice.console import console, say, table
from lattice.hardware import GPUS
from lattice.ledger import ledger
from lattice.plan import CHECKPOINTING, Setting, Target, cheapest, plan, thinking_recipes
from lattice.recipe import Recipe
from lattice.registry import UnknownName, nearest


def run_plan(
    recipe: Recipe,
    thoughts: Sequence[int] | None,
    *,
    gpu: str,
    gpus: int,
    utilization: float,
    out: Path | None,
) -> list[Setting]:
    """Shows and returns every setting, writes them to `out` as jsonl if given. `thoughts` as in `plan`."""
    if gpu not in GPUS:
        raise UnknownName(f"gpu '{gpu}' is not known{nearest(gpu, GPUS)} Known: {', '.join(GPUS)}")
    target = Target(gpu=GPUS[gpu], gpus=gpus, utilization=utilization)
    if out is not None:
        check_writable(out)
    settings = list(
        track(
            plan(recipe, thoughts, target),
            "computing steps on fake tensors",
            total=len(thinking_recipes(recipe, thoughts)) * len(CHECKPOINTING),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )
    _show(recipe, settings, target, gpu)
    if out is not None:
        lines = [json.dumps({"gpu": gpu, "gpus": gpus, **dataclasses.asdict(one)}) for one in settings]
        with naming(out):
            out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        say(f"wrote {out}")
    return settings


def _show(recipe: Recipe, settings: Sequence[Setting], target: Target, gpu: str) -> None:
    run, costs = recipe.run, ledger(recipe)
    say(
        f"{costs.parameters:,} parameters, {costs.layer_parameters:,} of them in layers; "
        f"{run.steps * run.batch_tokens:,} tokens in sequences of {run.sequence_tokens}"
    )
    say(
        f"{target.gpus} x {gpu}, {target.utilization:.0%} of {target.gpu.peak / 1e12:,.0f} TFLOP/s assumed"
        + ("" if target.gpus == 1 else f"; parallel: {_inline(recipe.component('parallel'))}")
    )
    first = {one.thoughts: one for one in settings}
    table(
        "a token, by thoughts K",
        ["K", "passes", "train MFLOP", "decoding MFLOP", "cache KiB"],
        [
            [
                str(count),
                f"{one.costs.training_token_passes:,.1f}",
                f"{one.costs.training_operations / 1e6:,.0f}",
                f"{one.costs.inference_operations / 1e6:,.0f}",
                f"{one.costs.cache_bytes() / 2**10:,.0f}",
            ]
            for count, one in first.items()
        ],
    )
    # Short, so that all of it stands on a terminal of 80 columns.
    parts = {
        "params": "parameters",
        "grads": "gradients",
        "optim": "optimizer",
        "acts": "activations",
        "logits": "logits",
    }
    table(
        "memory of a rank at its peak, GiB, with B sequences at once",
        ["K", "recompute", "B", *parts, "total", "fits"],
        [
            [
                str(one.thoughts),
                one.checkpointing,
                str(one.micro_batch),
                *[_gib(getattr(one.memory, part)) for part in parts.values()],
                _gib(one.memory.total),
                ("yes" if one.gathered else "pass") if one.fits else "no",
            ]
            for one in settings
        ],
    )
    if any(one.fits and not one.gathered for one in settings):
        say("fits, pass: if weights are gathered for each pass and not for the whole step (reshard)")
    best = [cheapest([one for one in settings if one.thoughts == count]) for count in first]
    table(
        "the cheapest setting that fits",
        ["K", "recompute", "B", "tokens/s", "days", "GPU-hours"],
        [
            [str(count), "none fits", "", "", "", ""]
            if one is None
            else [
                str(count),
                one.checkpointing,
                str(one.micro_batch),
                f"{one.tokens_per_second:,.0f}",
                f"{one.days:,.1f}",
                f"{one.gpu_hours:,.0f}",
            ]
            for count, one in zip(first, best, strict=True)
        ],
    )
    if target.gpus > 1:
        shown = [one or first[count] for count, one in zip(first, best, strict=True)]
        _show_communication(recipe, shown, target)
    if None in best:
        say("where none fits, a single sequence at once does not: take more or larger GPUs")


def _gib(size: int) -> str:
    gib = size / 2**30
    return f"{gib:,.{1 if gib < 100 else 0}f}"


def _inline(component: object) -> str:
    return ", ".join(f"{name} = {value}" for name, value in options.to_table(component).items())


def _show_communication(recipe: Recipe, settings: Sequence[Setting], target: Target) -> None:
    """Of the settings, one for each number of thoughts."""
    table(
        "communication of a rank in a step if weights are sharded: GB, seconds, share of computing",
        ["K", "reshard", "shards", "copies", "gathers", "weights", "grads", "s", "share"],
        [
            [
                str(setting.thoughts),
                one.reshard,
                str(one.shards),
                str(one.replicas),
                f"{one.layer_gathers:,.1f}",
                f"{one.gathered / 1e9:,.1f}",
                f"{one.reduced / 1e9:,.1f}",
                f"{one.seconds:,.3f}",
                f"{one.share:.1%}",
            ]
            for setting in settings
            for one in setting.communication
        ],
    )
    gpu, parallel = target.gpu, recipe.component("parallel")
    at_once = parallel.tokens(min(one.micro_batch for one in settings) * recipe.run.sequence_tokens)
    slots = slots_to_hide(recipe, gpu, target.gpus, target.utilization)
    say(
        f"at {gpu.link / 1e9:,.0f} GB/s within a node of {gpu.node}, {gpu.network / 1e9:,.0f} GB/s a GPU "
        f"between nodes; gathering a layer takes as long as computing {slots:,.0f} slots of it, a rank has "
        f"{at_once:,} tokens at once"
    )
