"""Seconds to score tasks whose questions have several answers: each answer with its context in a row of its
own, and in rows that share the context; in turns, in one process, its own time.

    python benchmarks/shared_contexts.py runs/mine --include data/eval --tasks hellaswag piqa --limit 50
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from lattice.branching import Row, Text
from lattice.lm_eval_model import LatticeLM
from lattice.load import load_subject


class Shared(LatticeLM):
    """As lattice scores, with what it took."""

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        self.tokens, start = 0, time.process_time()
        self.scores = super()._loglikelihood_tokens(requests, *args, **options)
        self.seconds = time.process_time() - start
        return self.scores

    def _hidden(self, rows: Sequence[Row]) -> Iterator[tuple[Text, torch.Tensor]]:
        self.tokens += sum(row.size for row in rows)
        return super()._hidden(rows)


class Separate(Shared):
    def _batches(self, inputs: Iterable[Text]) -> list[list[Row]]:
        rows = [Row((text,), len(text)) for text in sorted(inputs, key=len, reverse=True)]
        return [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--include", required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    subject = load_subject(options.run, device="cpu")
    manager = TaskManager(include_path=options.include, include_defaults=False)
    for task in options.tasks:
        models = [Separate(subject), Shared(subject)]
        seconds: list[list[float]] = [[], []]
        for _ in range(options.repeats):
            for model, found in zip(models, seconds, strict=True):
                lm_eval.simple_evaluate(
                    model=model, tasks=[task], limit=options.limit, task_manager=manager, bootstrap_iters=0
                )
                found.append(model.seconds)
        gaps = [
            abs(one[0] - other[0]) for one, other in zip(*(model.scores for model in models), strict=True)
        ]
        figures = {
            "tokens": [model.tokens for model in models],
            "seconds": [round(min(found), 2) for found in seconds],
            "largest difference of a score": max(gaps),
        }
        print(json.dumps({"task": task, **figures}), flush=True)


if __name__ == "__main__":
    main()
