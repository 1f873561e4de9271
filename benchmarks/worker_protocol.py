"""What the processes of benchmarks/against_reference.py share: a step for each line of standard input.

Imported in both environments, so that it needs torch alone, and so does what it takes from lattice.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 32
"""Tokens that a step of decoding adds to the prompt."""


def status(name: str) -> float:
    """A size of this process in MiB, from Linux's /proc."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def module(name: str, path: Path) -> Any:
    """A file, imported without the package that it lies in."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def live_mib(step: Callable[[], Any]) -> float:
    """Most that tensors hold during a step, whatever the allocator makes of it."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    path = Path(__file__).parents[1] / "lattice" / "live_tensors.py"
    live = module("live_tensors", path).LiveTensors(tensors)
    del tensors
    with live:
        step()
    return float(live.peak / 2**20)


def serve(build: Callable[[], Callable[[], Any]]) -> None:
    """Builds, answers that it is ready, and then every line with the seconds of a step, those of its
    threads, and the peak of the process above what it held before; the line `live` with the peak of live
    tensors in a step of its own."""
    before = status("VmRSS")
    step = build()
    answer({"seconds": 0.0})
    for line in sys.stdin:
        if line == "live\n":
            answer({"live_mib": live_mib(step)})
            continue
        start, busy = time.perf_counter(), time.process_time()
        step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
        answer({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": status("VmHWM") - before})


def answer(values: dict[str, float]) -> None:
    print(json.dumps(values), flush=True)
