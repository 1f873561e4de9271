"""Runs on several ranks: processes that torchrun starts, which train one recipe after the other.

One start serves many recipes, since starting costs more than training models as small as these.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
RECIPE = {
    "run": {
        "seed": 3,
        "steps": 6,
        "batch_tokens": 128,
        "sequence_tokens": 16,
        "device": "cpu",
        "timeout": 60.0,
    },
    "backbone": {
        "kind": "gpt_neox",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 272,
        "max_position_embeddings": 32,
        "rotary_pct": 0.5,
    },
    "recurrence": {"kind": "latent_thoughts", "thoughts": 1},
    "data": {"kind": "embedded", "megabytes": 0.2},
    "evaluators": {"validation": {"kind": "perplexity", "every": 0, "max_tokens": 300}},
    "metrics": {},
}


def recipe_of(**tables):
    """RECIPE with tables changed: keys are merged, and another kind starts its table afresh."""
    recipe = {**RECIPE}
    for name, table in tables.items():
        fresh = "kind" in table and table["kind"] != recipe.get(name, {}).get("kind")
        recipe[name] = table if fresh else {**recipe.get(name, {}), **table}
    return recipe


def train_on(ranks, cases, folder, *, environment=None, timeout=300):
    """Trains every recipe of `cases` (by name) on so many ranks; returns by name what each rank says of it: a
    summary, an error, and how often it gathered weights and reduced gradients."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "cases.json"
    plan.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(WORKER), str(plan)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    said = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [of_rank[name] for of_rank in said] for name in cases}


def metrics(folder):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in metrics(folder) if "lr" in row]
