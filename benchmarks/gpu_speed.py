"""How fast a GPU trains and decodes, in how much memory. See benchmarks/gpu.py."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from gpu_cases import Cases, build, compile_layers, free, recipe_of, some_ids, synchronize
from torch import Tensor

import lattice
from lattice import replay
from lattice.arrangement import RESERVE
from lattice.draws import Draw
from lattice.hardware import peak_of
from lattice.ledger import ledger
from lattice.protocols import Optimizer, Precision
from lattice.run_folder import peak_memory_mib

MOST_ROWS = 32
"""Sequences of a step, where not so many are asked for."""


def goal(options: argparse.Namespace) -> Cases:
    for compiled in ways(options, "no", "yes"):
        for precision in options.precisions:
            labels = labels_of(options, options.sizes[0], 1, precision, "none", compiled=compiled)
            yield labels, functools.partial(measure, labels=labels, options=options)


def thoughts(options: argparse.Namespace, size: str) -> Cases:
    before = [labels for labels, _ in goal(options)] if options.part == "all" else []
    for checkpointing in options.checkpointing:
        for count in options.thoughts:
            for compiled in ways(options, "no"):
                for precision in options.precisions:
                    labels = labels_of(options, size, count, precision, checkpointing, compiled=compiled)
                    if labels not in before:
                        yield labels, functools.partial(measure, labels=labels, options=options)


def ways(options: argparse.Namespace, *default: str) -> list[bool]:
    """Layers compiled or not, in the order asked for."""
    return [way == "yes" for way in options.compiled or default]


def labels_of(
    options: argparse.Namespace, size: str, count: int, precision: str, checkpointing: str, *, compiled: bool
) -> dict[str, Any]:
    """Of a training step."""
    model = {"size": size, "thoughts": count, "precision": precision, "checkpointing": checkpointing}
    if options.layers:
        model["layers"] = options.layers
    return {**model, "compiled": compiled, "length": options.length}


class Step:
    """A training step (forward, backward, AdamW) on as many sequences as are given."""

    def __init__(self, labels: dict[str, Any], device: torch.device) -> None:
        self.recipe = recipe_of(
            labels["size"],
            labels["thoughts"],
            device=device,
            precision=labels["precision"],
            checkpointing=labels["checkpointing"],
            layers=labels.get("layers"),
        )
        self.labels, self.device = labels, device
        self.model = build(self.recipe, device, drawn=False)
        optimizer: Optimizer = self.recipe.component("optimizer")
        self._optimizer = optimizer.build(self.model)
        self._precision: Precision = self.recipe.component("precision")

    def __call__(self, ids_BL: Tensor) -> None:
        self._optimizer.zero_grad()  # first: a step that did not fit has left gradients
        with self._precision.autocast(self.device):
            loss = self.model(ids_BL, targets=ids_BL.roll(-1, 1), draw=Draw(0, 0)).loss
        assert loss is not None
        loss.backward()
        self._optimizer.step()


def ready(labels: dict[str, Any], options: argparse.Namespace) -> tuple[Step, int]:
    """The step, compiled if it is to be, and how many sequences it takes: those asked for, or what fits.

    That is found without compiled layers, which would be compiled for each number. Predicting it
    (lattice.memory) takes longer than these steps: seconds to half a minute of a CPU for 24 layers.
    """
    device = options.device
    step, rows = Step(labels, device), options.micro_batch

    def probe(rows: int) -> tuple[float, float]:
        ids_BL = some_ids(step.model, rows, options.length)
        step(ids_BL)  # makes the optimizer's moments
        forget_peak(device)
        seconds = timed(functools.partial(step, ids_BL), device)
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, seconds

    if rows is None:
        room = math.inf
        if device.type == "cuda":
            room = (1 - RESERVE) * torch.cuda.get_device_properties(device).total_memory
        rows = rows_that_fit(probe, most=MOST_ROWS, room=room, seconds=options.step_seconds)
        free()
    if labels["compiled"]:
        torch.compiler.reset()
        compile_layers(step.model, device)
    return step, rows


def rows_that_fit(
    probe: Callable[[int], tuple[float, float]], *, most: int, room: float, seconds: float
) -> int:
    """As many rows, at least one, as take no more than `room` bytes and `seconds`, if both grow from one row
    to the next as they do from the first to the second. `probe` tells them of so many rows."""
    first_bytes, _ = probe(1)
    try:
        second_bytes, second_seconds = probe(2)
    except torch.OutOfMemoryError:
        return 1
    more = math.inf if second_bytes <= first_bytes else (room - second_bytes) / (second_bytes - first_bytes)
    return max(1, math.floor(min(most, 2 + more, 2 * seconds / second_seconds)))


def measure(found: dict[str, Any], *, labels: dict[str, Any], options: argparse.Namespace) -> None:
    """A training step, timed: median and quartiles of tokens/s, peak memory, MFU."""
    step, rows = ready(labels, options)
    while True:
        found["micro_batch"] = rows
        try:
            found |= speed(step, rows, options)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows = rows * 3 // 4
        free()  # outside of the handler, whose traceback holds the tensors
    if options.profile:
        found |= profiled(step, rows, options)


def speed(step: Step, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    device, length = options.device, options.length
    call = functools.partial(step, some_ids(step.model, rows, length))
    first = timed(call, device)
    for _ in range(options.warm_up - 1):
        call()
    synchronize(device)
    forget_peak(device)
    rates = sorted(rows * length / one for one in repeated(call, options))
    low, median, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    peak, operations = peak_of(device), ledger(step.recipe, length=length).training_operations
    return {
        "tokens_per_second": round(median, 1),
        "quartiles": [round(low, 1), round(high, 1)],
        "repetitions": len(rates),
        "first_seconds": round(first, 2),
        "peak_mib": round(peak_memory_mib(device)),
        "mfu": None if peak is None else round(median * operations / peak, 4),
    }


def repeated(call: Callable[[], Any], options: argparse.Namespace) -> list[float]:
    """Seconds of each repetition, two at least, if so many are asked for."""
    start, taken = time.perf_counter(), list[float]()
    while len(taken) < options.repetitions:
        if len(taken) >= 2 and time.perf_counter() - start >= options.case_seconds:
            break
        taken.append(timed(call, options.device))
    return taken


def timed(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def profiled(step: Step, rows: int, options: argparse.Namespace) -> dict[str, str]:
    """Of one step a table by time, and a trace for chrome://tracing: the names of the files."""
    from torch.profiler import ProfilerActivity

    ids_BL, cuda = some_ids(step.model, rows, options.length), options.device.type == "cuda"
    step(ids_BL)
    synchronize(options.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        step(ids_BL)
        synchronize(options.device)
    labels = step.labels
    way = "compiled" if labels["compiled"] else "eager"
    name = "_".join(map(str, ["profile", labels["size"], f"K{labels['thoughts']}", labels["precision"], way]))
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=50, max_name_column_width=90)
    (options.out / f"{name}.txt").write_text(table, encoding="utf-8")
    profiler.export_chrome_trace(str(options.out / f"{name}.json.gz"))
    return {"table": f"{name}.txt", "trace": f"{name}.json.gz"}


def decode(options: argparse.Namespace, size: str) -> Cases:
    prompt, new = (8, 8) if options.tiny else (128, 64)
    for count in options.thoughts:
        for rows in options.batches:
            for graphs in options.graphs:
                labels = {"size": size, "thoughts": count, "batch": rows, "prompt": prompt, "new": new}
                labels["graphs"] = graphs == "yes"
                yield labels, functools.partial(decoding, labels=labels, options=options)


def decoding(found: dict[str, Any], *, labels: dict[str, Any], options: argparse.Namespace) -> None:
    """The first new token is the prompt's, its thoughts found in parallel; the others are timed."""
    rows, new = labels["batch"], labels["new"]
    recipe = recipe_of(labels["size"], labels["thoughts"], device=options.device)
    model = build(recipe, options.device, drawn=False).eval()
    after = replay.AFTER if labels["graphs"] else sys.maxsize
    ids_BL = some_ids(model, rows, labels["prompt"])
    generate = functools.partial(lattice.generate, model, ids_BL, parallel_prefill=True)
    recorded = mock.patch.object(replay, "AFTER", after)
    with recipe.component("precision").autocast(options.device), torch.no_grad(), recorded:
        generate(max_new_tokens=2)
        synchronize(options.device)
        first, whole = (
            repeated(functools.partial(generate, max_new_tokens=count), options) for count in (1, 1 + new)
        )
    prefill, median = statistics.median(first), statistics.median(whole)
    found |= {
        "tokens_per_second": round(rows * new / (median - prefill), 1),
        "prefill_ms": round(1e3 * prefill, 2),
        "whole_ms": [round(1e3 * one, 2) for one in (min(whole), median, max(whole))],
        "repetitions": len(whole),
    }
