"""What only a GPU can show, on one of them: how fast it is, in how much memory, whether it computes the same.

    python benchmarks/gpu.py [PART] [--sizes 1.4b 410m 160m] [--seconds 540] [--out DIRECTORY]

Where lattice is not installed, PYTHONPATH=. lets it be found. Without a PART all are done, the most important
first:

goal      A training step (forward, backward, AdamW) of the first size with one thought, nothing computed
          again: bfloat16 and float8, as it is and compiled. Tokens/s, peak memory, MFU.
thoughts  The same of each size, number of thoughts, precision and checkpointing, as it is if --compiled does
          not say otherwise.
decode    New tokens/s, thoughts in sequence through the cache, passes recorded as CUDA graphs and not.
parity    The golden cases in float32 (needs pytest); attention's kernels, CUDA graphs, float8 and compiled
          layers against the plain way.
kernels   The matrix products of a layer and its attention by themselves, which bound all else.

Each size has its thoughts, then its decoding, before the next. With --profile a step of each case of goal
and thoughts is done once more under torch.profiler: a table by time, and a trace for chrome://tracing. Every
case is a line of gpu_PART.jsonl in --out, with hardware, versions, and the error where it failed; the others
go on. None begins after --seconds.
The exit status is 1 if a case of parity failed. `--device cpu --sizes tiny` tries the script out; its times
say nothing.

A step takes as many sequences as fit and as --step-seconds allow; steps on one and on two of them tell.
MFU counts the operations of the ledger (lattice/ledger.py), none that are computed again. It is a share of
the dense bfloat16 peak, in float8 too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_cases import PRECISIONS, Cases, Report
from gpu_kernels import kernels
from gpu_parity import parity
from gpu_speed import decode, goal, thoughts

from lattice.console import say

PARTS = ("goal", "thoughts", "decode", "parity", "kernels")


def parts(options: argparse.Namespace) -> Iterator[tuple[str, Cases]]:
    """All cases, the most important first."""
    yield "goal", goal(options)
    for size in options.sizes:
        yield "thoughts", thoughts(options, size)
        yield "decode", decode(options, size)
    yield "parity", parity(options)
    for size in options.sizes:
        yield "kernels", kernels(options, size)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["all", *PARTS], default="all")
    parser.add_argument("--sizes", nargs="+", default=["1.4b", "410m", "160m"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--thoughts", nargs="+", type=int, default=[1, 0, 2, 3])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16", "float8"])
    parser.add_argument("--checkpointing", nargs="+", default=["none", "pass"])
    parser.add_argument(
        "--compiled", nargs="+", choices=["no", "yes"], help="layers; both in goal if not given"
    )
    parser.add_argument("--profile", action="store_true", help="a table and a trace of each step as well")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, help="sequences of a step; as many as fit if not given")
    parser.add_argument(
        "--layers", type=int, help="of a model, in place of all: a try that leaves torch compiled layers"
    )
    parser.add_argument(
        "--step-seconds", type=float, default=2, help="of a step: no more sequences than take this long"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of decode")
    parser.add_argument(
        "--graphs", nargs="+", choices=["yes", "no"], default=["yes", "no"], help="CUDA graphs, of decode"
    )
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=10, help="at most")
    parser.add_argument("--case-seconds", type=float, default=10, help="begin no repetition after this long")
    parser.add_argument("--seconds", type=float, default=540, help="begin no case after this long")
    options = parser.parse_args(arguments)
    options.tiny = options.sizes == ["tiny"]
    if options.tiny:
        options.length, options.micro_batch, options.warm_up, options.repetitions = 32, 2, 1, 2
    on_gpu = options.device.type == "cuda" and torch.cuda.is_available()
    if options.device.type == "cuda" and not on_gpu:
        parser.error("--device cuda: there is none here; try the script with --device cpu --sizes tiny")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    report, deadline, left = Report(options.out, options.device), time.monotonic() + options.seconds, 0
    for part, cases in parts(options):
        if options.part not in ("all", part):
            continue
        for labels, case in cases:
            if time.monotonic() >= deadline:
                left += 1
                continue
            with report.case(part, **labels) as found:
                case(found)
    if left:
        say(f"{left} cases left out after {options.seconds} s: raise --seconds")
    if report.failed:
        say(f"{report.failed.total()} cases failed")
    return int(report.failed["parity"] > 0)


if __name__ == "__main__":
    sys.exit(main())
