"""A tiny recipe, and what its runs left behind."""

import json
import os
import subprocess
import sys

RECIPE = """
imports = ["user.py"]

[run]
seed = 3
steps = 12
batch_tokens = 128
sequence_tokens = 16
micro_batch = 4
device = "cpu"
log_every = 1

[backbone]
kind = "gpt_neox"
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 32
vocab_size = 257
max_position_embeddings = 64
rotary_pct = 0.5

[recurrence]
kind = "latent_thoughts"
thoughts = 1
jacobi = { train = [1, 3], eval = 2 }

[optimizer]
kind = "adamw"
lr = 1e-2

[data]
kind = "embedded"
megabytes = 0.5
validation_fraction = 0.3

[checkpoint]
kind = "dcp"
every = 4
keep = 3

[evaluators.validation]
kind = "perplexity"
every = 3
max_tokens = 64
"""


def rows(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def steps(folder):
    return [row["step"] for row in rows(folder) if "loss" in row]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def stop_at(step, name="SIGTERM"):
    return ("metrics.stop.kind=test_signal", f"metrics.stop.step={step}", f"metrics.stop.name={name}")


def start(place, out, *overrides, limit=None, own_group=False):
    """`lattice run` as another process, or as a group of processes of its own; `limit` is the largest file it
    may write."""
    code = "import sys, lattice.cli; lattice.cli.main(sys.argv[1:])"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    arguments = ["run", str(place / "tiny.toml"), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *(["--set", *overrides] if overrides else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"},
        process_group=0 if own_group else None,
    )
