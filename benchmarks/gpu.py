"""What only a GPU can show, on one of them: whether it computes the same, how fast, in how much memory.

    python benchmarks/gpu.py parity|thoughts|profile|decode [--sizes 160m 410m 1.4b] [--out DIRECTORY]

parity    The golden cases in float32; attention's kernels, float8 and compiled layers against the plain way.
thoughts  A training step (forward, backward, AdamW) of each size, number of thoughts, precision and
          checkpointing, with --compile also compiled: tokens/s, peak memory, MFU.
profile   Three such steps under torch.profiler: a table by time, and a trace for chrome://tracing.
decode    New tokens/s, thoughts in sequence through the cache.

Every case is a line of gpu_PART.jsonl in --out, with hardware, versions, and the error where it failed; the
others go on. The exit status is 1 if a case of parity failed. `--device cpu --sizes tiny` tries the script
out; its times say nothing.

MFU counts the operations of the ledger (lattice/ledger.py), none that are computed again. It is a share of
the dense bfloat16 peak, in float8 too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from gpu_cases import PRECISIONS, Report
from gpu_parity import parity
from gpu_speed import decode, profile, thoughts

from lattice.console import say

PARTS = {"parity": parity, "thoughts": thoughts, "profile": profile, "decode": decode}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--sizes", nargs="+", default=["160m", "410m", "1.4b"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--thoughts", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16", "float8"])
    parser.add_argument("--checkpointing", nargs="+", default=["none", "pass"])
    parser.add_argument("--compile", action="store_true", help="thoughts: also compiled; profile: compiled")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=32, help="the first to try")
    parser.add_argument("--profile-batch", type=int, default=2)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of decode")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=540, help="thoughts: begin no case after this long")
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
    report = Report(options.out, options.part, options.device)
    PARTS[options.part](options, report)
    if report.failed:
        say(f"{report.failed} cases failed")
    return int(options.part == "parity" and report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
