"""lattice beside the method's reference implementation, in turn on one machine: training steps, or decoding.

    python benchmarks/against_reference.py --reference FOLDER --python PYTHON [--thoughts 0 1 2 3]
    python benchmarks/against_reference.py --reference FOLDER --python PYTHON --mode decode

FOLDER is a checkout of LUMIA-Group/PonderLM-2, PYTHON the interpreter of an environment with its transformers
(4.46) and the same torch; nothing of either is part of lattice. Both train Pythia-70m's shape with AdamW on
batch x length tokens, three Jacobi refinements in every step, the same mathematics (tests/parity); or decode
32 tokens greedily after a prompt of 32, one row, with the shape of recipes/llama_125m.toml. Each is a process
of its own that waits while another one works, so that all see the same machine.

Prints medians and ratios with their quartiles, the seconds that the threads of a process were busy (on a
machine that others use this varies less), the peak of each process above what it held before its model was
built, and the peak of its live tensors; appends a line for each arm to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lattice import hardware
from lattice.console import say, table

HERE = Path(__file__).parent
SWEEPS = ["recurrence.solver=gauss_seidel", "recurrence.gauss_seidel={train=[2, 2], eval=2}"]
"""Three sweeps, two after the first: nearer to the definition than three Jacobi refinements are (K = 3:
1.0e-3, 3.9e-3; docs/recurrences.md)."""
ARMS: dict[str, dict[str, list[str]]] = {
    "train": {"jacobi": [], "jacobi, pass": ["activation_checkpoint.kind=pass"], "sweeps": SWEEPS},
    "decode": {"jacobi": [], "sweeps": SWEEPS},
}
"""Of lattice, as overrides. Decoding needs a solver for the thoughts of the prompt alone."""


class Worker:
    """One arm, in a process that takes a step when it is told to."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def asked(self, command: str) -> dict[str, float]:
        """ "step", or "live" for its memory."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer


def measured(workers: dict[str, Worker], warm_up: int, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Steps of all workers in turn, every other round in the opposite order."""
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(warm_up + repetitions):
        names = list(workers)
        for name in names if number % 2 == 0 else reversed(names):
            one = workers[name].asked("step")
            if number >= warm_up:
                steps[name].append(one)
    return steps


def compare(options: argparse.Namespace, thoughts: int, precision: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment.pop("OMP_WAIT_POLICY", None)
    if options.wait == "sleeping":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    decoding = options.mode == "decode"
    batch = options.batch or (1 if decoding else 2)
    length = options.length or (32 if decoding else 256)
    common = [options.mode, str(thoughts), precision, str(batch), str(length)]
    reference = [options.python, str(HERE / "reference_worker.py"), str(options.reference), *common]
    workers = {"reference": Worker(reference, environment)}
    arms = ARMS[options.mode]
    for name in arms if thoughts else list(arms)[:1]:
        ours = [sys.executable, str(HERE / "lattice_worker.py"), *common, *arms[name]]
        workers[name] = Worker(ours, environment)
    try:
        steps = measured(workers, options.warm_up, options.repetitions)
        live = {name: worker.asked("live")["live_mib"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()
    rows = []
    for name, taken in steps.items():
        pairs = zip(steps["reference"], taken, strict=True)
        ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in pairs]
        rows.append(
            {
                "benchmark": "against_reference",
                "mode": options.mode,
                "arm": name,
                "thoughts": thoughts,
                "precision": precision,
                "batch": batch,
                "length": length,
                "threads": options.threads,
                "wait": options.wait,
                "repetitions": options.repetitions,
                "seconds": statistics.median(one["seconds"] for one in taken),
                "speedup": quartiles(ratios),
                "cpu_seconds": statistics.median(one["cpu_seconds"] for one in taken),
                "peak_mib": max(one["peak_mib"] for one in taken),
                "live_mib": live[name],
                "hardware": options.hardware,
                "torch": options.torch,
            }
        )
    return rows


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def show(rows: list[dict[str, Any]]) -> None:
    columns = [
        "K",
        "precision",
        "arm",
        "seconds",
        "times faster (quartiles)",
        "of its threads",
        "peak MiB",
        "live MiB",
    ]
    cells = []
    for row in rows:
        low, median, high = row["speedup"]
        cells.append(
            [
                str(row["thoughts"]),
                row["precision"],
                row["arm"],
                f"{row['seconds']:.2f}",
                f"{median:.2f} ({low:.2f} to {high:.2f})",
                f"{row['cpu_seconds']:.2f}",
                f"{row['peak_mib']:,.0f}",
                f"{row['live_mib']:,.0f}",
            ]
        )
    table("a step of training" if rows[0]["mode"] == "train" else "32 tokens decoded", columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--thoughts", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--mode", choices=["train", "decode"], default="train")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--wait",
        choices=("sleeping", "spinning"),
        default="sleeping",
        help="what threads do until they are needed again; OpenMP's default is to spin a while, which is "
        "faster where nothing else runs, and slower by far where something does",
    )
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="results/against_reference[_decode].jsonl if not given")
    options = parser.parse_args()
    suffix = "" if options.mode == "train" else f"_{options.mode}"
    options.out = options.out or HERE / "results" / f"against_reference{suffix}.jsonl"
    import torch

    torch.set_num_threads(options.threads)
    options.hardware, options.torch = hardware.describe(torch.device("cpu")), torch.__version__
    rows: list[dict[str, Any]] = []
    for precision in options.precisions:
        for thoughts in options.thoughts:
            new = compare(options, thoughts, precision)
            rows += new
            with options.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            for row in new:
                shown = f"{row['seconds']:.2f} s, {row['peak_mib']:,.0f} MiB, {row['live_mib']:,.0f} live"
                say(f"K={thoughts} {precision} {row['arm']}: {shown}")
    show(rows)


if __name__ == "__main__":
    main()
