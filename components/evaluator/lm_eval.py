"""Downstream tasks, by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.harness import run_tasks
from lattice.protocols import EvaluationSubject, Evaluator
from lattice.registry import register


@register("evaluator", "lm_eval")
@dataclass(frozen=True, kw_only=True)
class LMEval(Evaluator):
    """Tasks of lm-eval: their metrics, each with its standard error."""

    tasks: tuple[str, ...]
    """Names of tasks or groups; "paper" is the nine of PonderLM-2."""
    include: str | None = None
    """Folder of local task files, such as `lattice prepare-eval` makes; its tasks go before lm-eval's own."""
    few_shot: int | None = None
    """Solved examples before each question; as the task says if not given."""
    limit: int | None = None
    """Questions of each task; all if not given."""
    batch: int = 16
    """Rows that are scored at once."""
    every: int = 0
    """Steps between evaluations; 0 for the end only."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks = []: must name at least one task of lm-eval")
        for name, least in (("few_shot", 0), ("limit", 1), ("batch", 1), ("every", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")

    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        results = run_tasks(
            subject,
            self.tasks,
            include=self.include,
            few_shot=self.few_shot,
            limit=self.limit,
            batch=self.batch,
        )
        return {
            f"{task}/{metric}": value
            for task, row in results.figures.items()
            for metric, value in row.items()
        }
