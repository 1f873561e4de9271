"""Downstream tasks, by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

from dataclasses import dataclass

from lattice.harness import check_tasks, run_tasks
from lattice.protocols import EvaluationSubject, Evaluator
from lattice.registry import register


@register("evaluator", "lm_eval")
@dataclass(frozen=True, kw_only=True)
class LMEval(Evaluator):
    """Tasks of lm-eval: their metrics, each with its standard error."""

    tasks: str | tuple[str, ...]
    """Names of tasks or groups, or one name; "paper" is the nine of PonderLM-2."""
    include: str | None = None
    """Folder of local task files, such as `lattice prepare-eval` makes; its tasks go before lm-eval's own."""
    few_shot: int | tuple[int, ...] | None = None
    """Solved examples before each question, or several such numbers; as the task says if not given."""
    limit: int | None = None
    """Questions of each task; all if not given."""
    batch: int = 16
    """Inputs that are scored at once, and texts that are decoded at once."""
    every: int = 0
    """Steps between evaluations; 0 for the end only."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks = []: must name at least one task of lm-eval")
        for name, least in (("limit", 1), ("batch", 1), ("every", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
        if self._shots == () or min(shots or 0 for shots in self._shots) < 0:
            raise ValueError(f"few_shot = {self.few_shot}: must be one or more numbers of at least 0")

    @property
    def _shots(self) -> tuple[int | None, ...]:
        return self.few_shot if isinstance(self.few_shot, tuple) else (self.few_shot,)

    def check(self, subject: EvaluationSubject) -> None:
        context = subject.model.shape.context
        check_tasks(self.tasks, context=context, include=self.include, few_shot=self._shots)

    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        """Keys are `task/metric`, or `task/5shot/metric` where there are several numbers of examples."""
        found: dict[str, float | str] = {}
        for shots in self._shots:
            results = run_tasks(
                subject,
                self.tasks,
                include=self.include,
                few_shot=shots,
                limit=self.limit,
                batch=self.batch,
            )
            among = f"{shots}shot/" if len(self._shots) > 1 else ""
            for task, row in results.figures.items():
                found |= {f"{task}/{among}{metric}": value for metric, value in row.items()}
        return found
