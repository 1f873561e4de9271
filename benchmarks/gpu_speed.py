"""How fast a GPU trains and decodes, in how much memory. See benchmarks/gpu.py."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Report, build, free, recipe_of, some_ids, synchronize
from torch import Tensor

import lattice
from lattice.console import say
from lattice.draws import Draw
from lattice.hardware import peak_of
from lattice.ledger import ledger
from lattice.protocols import Precision
from lattice.run_folder import peak_memory_mib


def measure(
    recipe: lattice.Recipe,
    device: torch.device,
    *,
    length: int,
    micro_batch: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """A training step on one micro-batch, timed: median and quartiles of tokens/s, peak memory, MFU."""
    step = training_step(recipe, device, length=length, micro_batch=micro_batch, compiled=options.compiled)
    for _ in range(options.warm_up):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed(step, device) for _ in range(options.repetitions)]
    tokens = micro_batch * length
    rates = sorted(tokens / one for one in seconds)
    low, median, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    peak, operations = peak_of(device), ledger(recipe, length=length).training_operations
    return {
        "micro_batch": micro_batch,
        "tokens_per_second": round(median, 1),
        "quartiles": [round(low, 1), round(high, 1)],
        "repetitions": len(rates),
        "peak_mib": round(peak_memory_mib(device)),
        "mfu": None if peak is None else round(median * operations / peak, 4),
    }


def timed(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def training_step(
    recipe: lattice.Recipe, device: torch.device, *, length: int, micro_batch: int, compiled: bool
) -> Callable[[], None]:
    model = build(recipe, device, compiled=compiled, drawn=False)
    optimizer = recipe.component("optimizer").build(model)
    precision: Precision = recipe.component("precision")
    ids_BL = some_ids(model, micro_batch, length)

    def step() -> None:
        with precision.autocast(device):
            loss = model(ids_BL, targets=ids_BL.roll(-1, 1), draw=Draw(0, 0)).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def thoughts(options: argparse.Namespace, report: Report) -> None:
    deadline = time.monotonic() + options.seconds
    compiled = [False, True] if options.compile else [False]
    cases = [
        {"size": size, "precision": precision, "checkpointing": kind, "compiled": one, "thoughts": count}
        for size in options.sizes
        for precision in options.precisions
        for kind in options.checkpointing
        for one in compiled
        for count in options.thoughts
    ]
    for number, case in enumerate(cases):
        if time.monotonic() > deadline:
            say(f"{len(cases) - number} cases left out after {options.seconds} s: raise --seconds")
            return
        with report.case(**case, length=options.length) as found:
            found |= fitted(case, options)


def fitted(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """With the largest micro-batch, halved from --micro-batch on, that fits."""
    device = options.device
    recipe = recipe_of(
        case["size"],
        case["thoughts"],
        device=device,
        precision=case["precision"],
        checkpointing=case["checkpointing"],
    )
    asked = argparse.Namespace(**{**vars(options), "compiled": case["compiled"]})
    micro_batch = options.micro_batch
    while True:
        torch.compiler.reset()
        try:
            return measure(recipe, device, length=options.length, micro_batch=micro_batch, options=asked)
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
            micro_batch //= 2
        free()  # outside of the handler, whose traceback holds the tensors


def profile(options: argparse.Namespace, report: Report) -> None:
    from torch.profiler import ProfilerActivity

    device, folder = options.device, Path(os.environ.get("OUT", options.out))
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for size in options.sizes:
        for count in options.thoughts:
            for precision in options.precisions:
                with report.case(size=size, thoughts=count, precision=precision) as found:
                    recipe = recipe_of(
                        size,
                        count,
                        device=device,
                        precision=precision,
                        checkpointing=options.checkpointing[0],
                    )
                    step = training_step(
                        recipe,
                        device,
                        length=options.length,
                        micro_batch=options.profile_batch,
                        compiled=options.compile,
                    )
                    step()
                    synchronize(device)
                    with torch.profiler.profile(activities=activities) as profiler:
                        for _ in range(3):
                            step()
                        synchronize(device)
                    name = f"profile_{size}_K{count}_{precision}"
                    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
                    table = profiler.key_averages().table(sort_by=order, row_limit=40)
                    (options.out / f"{name}.txt").write_text(table, encoding="utf-8")
                    folder.mkdir(parents=True, exist_ok=True)
                    profiler.export_chrome_trace(str(folder / f"{name}.json"))
                    found["table"], found["trace"] = f"{name}.txt", f"{name}.json"


def decode(options: argparse.Namespace, report: Report) -> None:
    device, prompt, new = options.device, *((8, 8) if options.tiny else (128, 64))
    for size in options.sizes:
        for count in options.thoughts:
            for rows in options.batches:
                with report.case(size=size, thoughts=count, batch=rows, prompt=prompt, new=new) as found:
                    recipe = recipe_of(size, count, device=device)
                    model = build(recipe, device, drawn=False).eval()
                    ids_BL = some_ids(model, rows, prompt)
                    with recipe.component("precision").autocast(device), torch.no_grad():
                        found |= decoding(model, ids_BL, new, options.repetitions)


def decoding(model: lattice.LanguageModel, ids_BL: Tensor, new: int, repetitions: int) -> dict[str, Any]:
    """The first new token is the prompt's, its thoughts found in parallel; the others are timed."""
    generate = functools.partial(lattice.generate, model, ids_BL, parallel_prefill=True)
    generate(max_new_tokens=2)
    synchronize(ids_BL.device)
    seconds: dict[int, list[float]] = {1: [], 1 + new: []}
    for _ in range(repetitions):
        for count, taken in seconds.items():
            taken.append(timed(functools.partial(generate, max_new_tokens=count), ids_BL.device))
    first, whole = (statistics.median(taken) for taken in seconds.values())
    return {
        "tokens_per_second": round(len(ids_BL) * new / (whole - first), 1),
        "prefill_ms": round(1e3 * first, 2),
        "whole_ms": [
            round(1e3 * value, 2) for value in (min(seconds[1 + new]), whole, max(seconds[1 + new]))
        ],
    }
