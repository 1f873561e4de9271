"""Runs the checks and says what holds and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lattice.registry import place_of
from lattice.testing import checks
from lattice.testing.subject import BACKBONES, Subject

CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "shapes": checks.shapes,
    "causality": checks.causality,
    "parallel and sequential": checks.parallel_and_sequential,
    "cached decoding": checks.cached_decoding,
    "batch and padding": checks.batch_and_padding,
    "documents": checks.documents,
    "branches": checks.branches,
    "gradients": checks.gradients,
    "determinism": checks.determinism,
    "cost": checks.cost,
    "save and load": checks.save_and_load,
}
"""By name. Each takes a Subject and returns a counterexample or None."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What came of one check on one backbone."""

    check: str
    claim: str
    """What the check asserts."""
    backbone: str
    counterexample: str | None
    """The smallest that was found; None where the claim holds."""

    @property
    def held(self) -> bool:
        return self.counterexample is None


def run_checks(
    recurrence: Mapping[str, Any], names: Sequence[str] | None = None, backbones: Sequence[str] | None = None
) -> Iterator[CheckResult]:
    """One result after the other; see `check_recurrence`."""
    for backbone in backbones or BACKBONES:
        _known("backbone", backbone, BACKBONES)
        subject = Subject(recurrence, backbone)
        for name in names or CHECKS:
            _known("check", name, CHECKS)
            claim = " ".join((CHECKS[name].__doc__ or "").split())
            with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(name == "gradients"):
                try:
                    found = CHECKS[name](subject)
                except Exception as error:  # a variant may raise anything: that is its counterexample
                    found = f"raises {type(error).__name__}: {error}{place_of(error)}"
            yield CheckResult(check=name, claim=claim, backbone=backbone, counterexample=found)


def _known(what: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"{what} = '{name}': must be one of {', '.join(known)}")


def check_recurrence(
    recurrence: Mapping[str, Any],
    *,
    checks: Sequence[str] | None = None,
    backbones: Sequence[str] | None = None,
) -> list[CheckResult]:
    """All checks on all backbones, or those that are named.

    `recurrence` is a recipe's `[recurrence]` table, its kind registered. What a variant raises is a result.
    Raises RecipeError for options that cannot be, ValueError for a check or backbone that does not exist.
    """
    return list(run_checks(recurrence, checks, backbones))


def assert_conforms(
    recurrence: Mapping[str, Any], *, check: str | None = None, backbone: str | None = None
) -> None:
    """For pytest. Raises AssertionError with the counterexample of every check that fails."""
    results = check_recurrence(
        recurrence, checks=[check] if check else None, backbones=[backbone] if backbone else None
    )
    failed = [f"{one.check} ({one.backbone}): {one.counterexample}" for one in results if not one.held]
    if failed:
        raise AssertionError("\n".join(failed))
