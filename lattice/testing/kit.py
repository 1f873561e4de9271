"""Runs the checks and says what holds and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lattice.registry import place_of
from lattice.testing import checks
from lattice.testing.subject import BACKBONES, RECURRENCES, Subject

CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "shapes": checks.shapes,
    "causality": checks.causality,
    "parallel and sequential": checks.parallel_and_sequential,
    "cached decoding": checks.cached_decoding,
    "batch and padding": checks.batch_and_padding,
    "documents": checks.documents,
    "pairs": checks.pairs,
    "branches": checks.branches,
    "gradients": checks.gradients,
    "determinism": checks.determinism,
    "cost": checks.cost,
    "thoughts": checks.thoughts,
    "save and load": checks.save_and_load,
}
"""By name. Each takes a Subject and returns a counterexample or None."""
OF_DOCUMENTS = ("documents", "pairs")
"""Those of masks that need documents."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What came of one check of one component."""

    check: str
    claim: str
    """What the check asserts."""
    beside: str
    """What the component was checked with: a kind of backbone for a recurrence, of recurrence for others."""
    counterexample: str | None
    """The smallest that was found; None where the claim holds."""

    @property
    def held(self) -> bool:
        return self.counterexample is None


ROLES: dict[str, tuple[Mapping[str, Any], Callable[[Mapping[str, Any], str], Subject]]] = {
    "recurrence": (BACKBONES, lambda table, beside: Subject(table, BACKBONES[beside])),
    "backbone": (RECURRENCES, lambda table, beside: Subject(RECURRENCES[beside], table)),
    "mask": (RECURRENCES, lambda table, beside: Subject(RECURRENCES[beside], BACKBONES["llama"], table)),
}
"""What can be checked: with what, and how the two make a subject."""


def run_checks(
    role: str,
    table: Mapping[str, Any],
    names: Sequence[str] | None = None,
    besides: Sequence[str] | None = None,
) -> Iterator[CheckResult]:
    """One result after the other; see `check_component`."""
    known, subject_of = ROLES[role]
    for beside in besides or known:
        _known("backbone" if role == "recurrence" else "recurrence", beside, known)
        subject = subject_of(table, beside)
        # A mask that needs documents says nothing of a batch that has none.
        able = OF_DOCUMENTS if subject.mask.needs_documents else tuple(CHECKS)
        for name in names or able:
            _known("check", name, able)
            claim = " ".join((CHECKS[name].__doc__ or "").split())
            with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(name == "gradients"):
                try:
                    found = CHECKS[name](subject)
                except Exception as error:  # a variant may raise anything: that is its counterexample
                    found = f"raises {type(error).__name__}: {error}{place_of(error)}"
            yield CheckResult(check=name, claim=claim, beside=beside, counterexample=found)


def _known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} = '{name}': must be one of {', '.join(known)}")


def check_component(
    role: str, table: Mapping[str, Any], *, checks: Sequence[str] | None = None
) -> list[CheckResult]:
    """All checks, or those that are named, of a recurrence over several backbones, or of a backbone or a mask
    with several recurrences. Of a mask that needs documents only how it treats these is looked at.

    `table` is that of a recipe, its kind registered; sizes that a backbone's does not give are small. What is
    raised in a check is a result. Raises RecipeError for options that cannot be, ValueError for a role or
    check that does not exist, and for a backbone that is not as small as the checks need.
    """
    _known("role", role, ROLES)
    return list(run_checks(role, table, checks))


def check_recurrence(
    recurrence: Mapping[str, Any],
    *,
    checks: Sequence[str] | None = None,
    backbones: Sequence[str] | None = None,
) -> list[CheckResult]:
    """As `check_component` of a recurrence, on all backbones or those that are named, which raises ValueError
    for one that does not exist."""
    return list(run_checks("recurrence", recurrence, checks, backbones))


def assert_conforms(
    table: Mapping[str, Any],
    *,
    check: str | None = None,
    backbone: str | None = None,
    role: str = "recurrence",
) -> None:
    """For pytest. Raises AssertionError with the counterexample of every check that fails; otherwise as
    `check_component`. A recurrence may be checked on one `backbone` alone."""
    _known("role", role, ROLES)
    results = run_checks(role, table, [check] if check else None, [backbone] if backbone else None)
    failed = [f"{one.check} ({one.beside}): {one.counterexample}" for one in results if not one.held]
    if failed:
        raise AssertionError("\n".join(failed))
