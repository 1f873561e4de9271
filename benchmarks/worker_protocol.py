"""What the processes of benchmarks/against_reference.py share: a step for each line of standard input.

Imported in both environments, so that it needs torch alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW_TOKENS = 32
"""Tokens that a step of decoding adds to the prompt."""


def status(name: str) -> float:
    """A size of this process in MiB, from Linux's /proc."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def serve(build: Callable[[], Callable[[], Any]]) -> None:
    """Builds, answers that it is ready, and then every line with the seconds of a step and the peak of the
    process above what it held before."""
    before = status("VmRSS")
    step = build()
    answer({"seconds": 0.0})
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        answer({"seconds": time.perf_counter() - start, "peak_mib": status("VmHWM") - before})


def answer(values: dict[str, float]) -> None:
    print(json.dumps(values), flush=True)
