"""What an evaluator found."""

from __future__ import annotations

from lattice.draws import undisturbed
from lattice.protocols import EvaluationSubject, Evaluator


def figures(name: str, evaluator: Evaluator, subject: EvaluationSubject) -> dict[str, float | str]:
    """Runs the evaluator that a recipe calls `name`, without a trace in the global generators: what training
    draws does not depend on what is evaluated. Raises ValueError for what is neither a number nor a text."""
    with undisturbed():
        found = evaluator.evaluate(subject)
    if not isinstance(found, dict):
        raise ValueError(f"[evaluators.{name}] gives a {type(found).__name__}; must be a dict of figures")
    for key, value in found.items():
        if not isinstance(value, int | float | str):
            raise ValueError(
                f"[evaluators.{name}] gives a {type(value).__name__} for '{key}'; must be a number or a text"
            )
    return found
