"""lattice beside the method's reference implementation on models, options and batches drawn at random.

    python benchmarks/random_parity.py --reference FOLDER --python PYTHON [--cases 220] [--seed 0]

FOLDER is a checkout of LUMIA-Group/PonderLM-2, PYTHON the interpreter of an environment with its transformers
(4.46), torch and safetensors; nothing of either is part of lattice. The golden cases (tests/parity) are a few
of one size; here sizes, rotary share and base, biases, tied heads, shared key-value heads, parallel
residuals, counts, iterations, padding and labels that are left out vary too, in float32.

Prints the largest difference for each kind: of logits and of the loss absolute, of gradients relative to the
norm of all of them, and for decoding 1 if a token is another one. Appends a line for each kind to --out, and
ends with 1 if a case is beyond 3e-5.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import lattice
from lattice import hardware
from lattice.console import say, table

warnings.filterwarnings("ignore", ".*multiplies the embeddings by")  # drawn weights had no scale before

HERE = Path(__file__).parent
LIMIT = 3e-5
"""What float32 loses where softmax feedback amplifies it: both sides are that far from lattice in float64, in
the same direction or not. Wrong by one iteration or one scale shows at 1e-2."""


def recurrence_of(case: dict[str, Any]) -> dict[str, Any]:
    """lattice's name for what the reference computed."""
    count = case["count"]
    thoughts = {"kind": "latent_thoughts", "thoughts": count, "jacobi": {"eval": case["iterations"]}}
    of_kind: dict[str, dict[str, Any]] = {
        "latent_thoughts": thoughts,
        "decoding": thoughts,
        "softmax feedback": {**thoughts, "feedback": "softmax"},
        "loop": {"kind": "loop", "loops": count},
        "pause": {"kind": "pause", "pauses": count, "pause_token_id": case["config"]["vocab_size"] - 1},
        "hidden_ponder": {"kind": "hidden_ponder", "steps": count},
        "ponder": {"kind": "ponder", "steps": count, "accumulate": False},
    }
    return of_kind[case["kind"]] | ({} if case["scaled"] else {"embed_scale": 1.0})


def differences(folder: Path, case: dict[str, Any]) -> dict[str, float]:
    model = lattice.from_pretrained(folder, recurrence_of(case))
    golden = load_file(folder / "case.safetensors")
    if case["kind"] == "decoding":
        tokens = lattice.generate(model, golden["ids"], case["new_tokens"], parallel_prefill=True)
        return {"tokens": float(not torch.equal(tokens, golden["tokens"]))}
    mask = golden["mask"]
    logits = model(golden["ids"], attention_mask=mask).logits
    targets = F.pad(golden["labels"][:, 1:], (0, 1), value=-100)
    loss = model(golden["ids"], attention_mask=mask, targets=targets).loss
    assert loss is not None
    loss.backward()
    parameters = model.decoder.named_parameters()
    gradients = {f"grad.{name}": one.grad for name, one in parameters if one.grad is not None}
    theirs = {name: one for name, one in golden.items() if name.startswith("grad.")}
    assert gradients.keys() == theirs.keys(), gradients.keys() ^ theirs.keys()
    apart = math.sqrt(sum((gradients[name] - one).square().sum().item() for name, one in theirs.items()))
    norm = math.sqrt(sum(one.square().sum().item() for one in theirs.values()))
    return {
        "logits": (logits - golden["logits"])[mask.bool()].abs().max().item(),
        "loss": abs(loss.item() - case["loss"]),
        "gradients": apart / norm,
    }


def drawn(options: argparse.Namespace, out: str) -> None:
    """The reference computes its cases, in its own environment."""
    arguments = [str(options.reference), out, str(options.cases), str(options.seed)]
    command = [options.python, str(HERE / "random_parity_reference.py"), *arguments]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def show(worst: dict[tuple[str, str], dict[str, float]], cases: Counter[tuple[str, str]]) -> None:
    measures = ["logits", "loss", "gradients", "tokens"]
    rows = [
        [*kind, str(cases[kind]), *(f"{found[name]:.2g}" if name in found else "" for name in measures)]
        for kind, found in sorted(worst.items())
    ]
    table("largest difference from the reference", ["backbone", "kind", "cases", *measures], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--cases", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "random_parity.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)

    worst: dict[tuple[str, str], dict[str, float]] = {}
    cases: Counter[tuple[str, str]] = Counter()
    beyond = 0
    with tempfile.TemporaryDirectory() as out:
        drawn(options, out)
        for folder in sorted(Path(out).iterdir()):
            case = json.loads((folder / "case.json").read_text())
            kind = case["architecture"], case["kind"]
            found = differences(folder, case)
            cases[kind] += 1
            worst[kind] = {
                name: max(value, worst.get(kind, {}).get(name, 0.0)) for name, value in found.items()
            }
            if max(found.values()) > LIMIT:
                beyond += 1
                say(f"beyond {LIMIT}: {found} in {case}")
    show(worst, cases)
    machine = {"hardware": hardware.describe(torch.device("cpu")), "torch": torch.__version__}
    with options.out.open("a", encoding="utf-8") as file:
        for of, found in sorted(worst.items()):
            row = {"benchmark": "random_parity", "backbone": of[0], "kind": of[1], "seed": options.seed}
            file.write(json.dumps({**row, "cases": cases[of], **found, **machine}) + "\n")
    return int(beyond > 0)


if __name__ == "__main__":
    sys.exit(main())
