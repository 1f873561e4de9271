"""How fast is `lattice prepare`, against its tokenizer alone, and how much memory does it take?

    python benchmarks/prepare.py [--megabytes 8 32] [--workers [0 1 2]] [--compression "" .xz]
                                 [--out benchmarks/results/prepare.jsonl]

The text is the source code of Python's standard library, over and over, as jsonl; the tokenizer a byte-level
BPE of 8192 tokens trained on it. Speeds are bytes of text a second of processor time, of all processes
together: on a machine that others use too, that is steadier than time on the clock, which is recorded beside
it. "marginal": from the smallest to the largest text, so that what starting costs is left out. Memory is the
largest sum of the processes' proportional set sizes, looked at four times a second. "tokenizer": encode_batch
alone, one thread, on the same texts in memory. "reading": records taken from the file alone, the limit of the
one thread that reads.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import zstandard

from lattice import hardware
from lattice.components.tokenizer.bpe import BpeTokenizer
from lattice.text_sources import JsonLines

STDLIB = Path(os.__file__).parent
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
}
VOCABULARY = 8192
SAMPLES_A_SECOND = 4


def texts(megabytes: float) -> list[str]:
    found: list[str] = []
    left = megabytes * 1e6
    while left > 0:
        for path in sorted(STDLIB.rglob("*.py")):
            if left <= 0 or "site-packages" in path.parts:
                continue
            content = path.read_bytes()
            try:
                found.append(content.decode())
            except UnicodeDecodeError:
                continue
            left -= len(content)
    return found


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def tokenizer_alone(codec: Any, documents: list[str]) -> dict[str, Any]:
    """Of one thread: the environment says so before the library starts its own."""
    size = sum(len(text.encode()) for text in documents)
    start = time.process_time()
    for first in range(0, len(documents), 100):
        codec.encode_batch(documents[first : first + 100])
    return {
        "case": "tokenizer",
        "megabytes": size / 1e6,
        "mb_per_cpu_second": size / 1e6 / (time.process_time() - start),
    }


def reading_alone(path: Path, megabytes: float) -> dict[str, Any]:
    start = time.process_time()
    for _ in JsonLines(str(path), None, "text").records(0):
        pass
    speed = megabytes / (time.process_time() - start)
    return {"case": "reading", "file": path.name, "megabytes": megabytes, "mb_per_cpu_second": speed}


def prepared(source: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, Any]:
    """`lattice prepare` in a process of its own, watched."""
    command = [sys.executable, "-m", "lattice", "prepare", str(source), "--out", str(out)]
    command += ["--tokenizer", str(tokenizer), "--workers", str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    main = psutil.Process(process.pid)
    processor: dict[int, float] = {}
    peak, start = 0, time.monotonic()
    while process.poll() is None:
        memory = 0
        for one in [main, *_children(main)]:
            try:
                used = one.cpu_times()
                memory += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            processor[one.pid] = used.user + used.system
        peak = max(peak, memory)
        time.sleep(1 / SAMPLES_A_SECOND)
    assert process.returncode == 0
    split = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    return {
        "case": "prepare",
        "workers": workers,
        "file": source.name,
        "megabytes": split["bytes"] / 1e6,
        "documents": split["documents"],
        "cpu_seconds": sum(processor.values()),
        "seconds": time.monotonic() - start,
        "peak_mib": peak / 2**20,
        "sha256": [shard["sha256"] for shard in split["shards"]],
    }


def marginal(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    more = {key: large[key] - small[key] for key in ("megabytes", "cpu_seconds", "seconds", "peak_mib")}
    return {
        "case": "marginal",
        "workers": large["workers"],
        "compression": Path(large["file"]).suffix,
        "megabytes": [small["megabytes"], large["megabytes"]],
        "mb_per_cpu_second": more["megabytes"] / more["cpu_seconds"],
        "mb_per_second": more["megabytes"] / more["seconds"],
        "peak_grows_by_mib": more["peak_mib"],
    }


def _children(main: psutil.Process) -> list[psutil.Process]:
    try:
        return list(main.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, nargs="+", default=[8, 32])
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--compression", nargs="+", choices=list(COMPRESS), default=[""])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prepare.jsonl")
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        row |= {"hardware": hardware.describe(torch.device("cpu")), "vocabulary": VOCABULARY}
        print(
            json.dumps({key: value for key, value in row.items() if key not in ("hardware", "sha256")}),
            flush=True,
        )
        rows.append(row)

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        documents = texts(min(arguments.megabytes))
        codec = BpeTokenizer(vocab_size=VOCABULARY).build(here / "tokenizer", lambda: iter(documents))
        add(tokenizer_alone(codec, documents))
        for megabytes in arguments.megabytes:
            documents = texts(megabytes)
            content, size = jsonl(documents), sum(len(text.encode()) for text in documents) / 1e6
            for suffix in arguments.compression:
                source = here / f"{megabytes:g}mb.jsonl{suffix}"
                source.write_bytes(COMPRESS[suffix](content))
                add(reading_alone(source, size))
                for workers in arguments.workers:
                    add(prepared(source, here / "tokenizer", here / f"{source.name}-{workers}", workers))
        runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["case"] == "prepare":
                runs.setdefault((row["workers"], Path(row["file"]).suffix), []).append(row)
        for several in runs.values():
            if len(several) > 1:
                add(marginal(several[0], several[-1]))
    made = {(row["megabytes"], str(row["sha256"])) for row in rows if row["case"] == "prepare"}
    assert len(made) == len({megabytes for megabytes, _ in made}), "the number of workers changed the bytes"
    with arguments.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
