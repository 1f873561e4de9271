"""After which tokens a run predicts worse than another: losses by how frequent the token is that was read,
or is to be predicted; and how much of the token that was read is left in the state that predicts.

    python benchmarks/rare_tokens.py runs/vocabulary/plain/seed0 runs/vocabulary/latent/seed0 \
        --trust-imports --out benchmarks/results/study/rare_tokens.jsonl

Shapes: B batch, L tokens, N tokens of all batches, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lattice.load import load_subject

RANKS = (0, 8, 32, 128, 512, 1024, 2048)
"""First ranks of the groups of tokens, the most frequent first."""


@torch.no_grad()
def read(run: Path, tokens: int, trust_imports: bool) -> dict[str, Tensor]:
    """Of every held-out token (N): what was read, what followed, its loss, and the cosine of the predicting
    state with the embedding of what was read, both without their means."""
    subject = load_subject(run, device="cpu", trust_imports=trust_imports)
    model, found = subject.model, list[tuple[Tensor, ...]]()
    for batch in subject.source.validation(tokens):
        with subject.autocast():
            hidden_BLD = model.hidden_states(batch.ids_BL)
            logits_BLV = model.decoder.head(hidden_BLD)
        losses_N = F.cross_entropy(
            logits_BLV.float().flatten(0, 1), batch.targets_BL.flatten(), reduction="none"
        )
        embedded_BLD = model.decoder.embedding(batch.ids_BL)
        states = [hidden_BLD.float().flatten(0, 1), embedded_BLD.flatten(0, 1)]
        found.append((batch.ids_BL.flatten(), batch.targets_BL.flatten(), losses_N, *states))
    ids_N, targets_N, losses_N, *states_ND = (torch.cat(parts) for parts in zip(*found, strict=True))
    state_ND, embedded_ND = (state_ND - state_ND.mean(0) for state_ND in states_ND)
    kept = targets_N != -100
    return {
        "read": ids_N[kept],
        "predicted": targets_N[kept],
        "loss": losses_N[kept],
        "cosine": F.cosine_similarity(state_ND, embedded_ND)[kept],
    }


def rows(runs: list[Path], tokens: int, trust_imports: bool) -> Iterator[dict[str, Any]]:
    found = [read(run, tokens, trust_imports) for run in runs]
    yield {"cosine with the embedding": [round(float(one["cosine"].mean()), 4) for one in found]}
    counts_V = torch.bincount(found[0]["predicted"])
    rank_V = counts_V.argsort(descending=True).argsort()
    for which in ("read", "predicted"):
        ids_N = found[0][which]
        rank_N = torch.where(
            ids_N < len(rank_V), rank_V[ids_N.clamp(max=len(rank_V) - 1)], torch.tensor(RANKS[-1])
        )
        for first, stop in zip(RANKS, (*RANKS[1:], None), strict=True):
            among_N = (rank_N >= first) & (rank_N < (stop or 1 << 30))
            losses = [float(one["loss"][among_N].mean()) for one in found]
            yield {
                "by": which,
                "ranks": [first, stop],
                "share": round(float(among_N.float().mean()), 3),
                "loss": [round(loss, 4) for loss in losses],
                "behind": round(losses[1] - losses[0], 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--trust-imports", action="store_true", help="import the code that the runs name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = rows(options.runs, options.tokens, options.trust_imports)
    lines = [json.dumps(row) for row in found]
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
