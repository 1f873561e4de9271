"""Solvers of the thoughts' fixed point, for all tokens at once.

The definition is sequential: z^{i+1}_t = feedback(h^i_t), where h^i_t reads the slots up to (t, i). Both
solvers iterate towards it; it is reached when every slot's inputs are settled, in K(L-1) iterations at most.

Shapes: B batch, L tokens, n stages a token, K thoughts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lattice.cache import KVCache
from lattice.components.recurrence._convergence import Convergence, gradients
from lattice.components.recurrence._feedback import Feedback
from lattice.protocols import Unrolled
from lattice.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be solved, and how far."""

    thoughts: int
    feedback: Feedback
    count: int
    """Iterations; at most, where there is a tolerance."""
    tolerance: float | None
    grad_passes: int | None


def jacobi(problem: Problem, stack: Stack, token_BL1D: Tensor, cache: KVCache | None) -> Unrolled:
    """The paper's (PonderLM-2, arXiv 2509.23184, section 3.2): a pass computes all slots from the thoughts of
    the pass before it. K(K+1)/2 + (count+1)(K+1) token-passes."""
    total = problem.thoughts + problem.count + 1
    convergence = Convergence(stack, problem.tolerance)
    slots_BLnD = token_BL1D
    for index in range(problem.thoughts):  # warm start: each pass refreshes the thoughts and adds one
        with gradients(index, total, problem.grad_passes):
            thoughts_BLkD = problem.feedback(stack, stack.run(slots_BLnD))
        slots_BLnD = torch.cat([token_BL1D, thoughts_BLkD], dim=2)
    for index in range(problem.thoughts, total - 1):
        before_BLKD = slots_BLnD[:, :, 1:]
        with gradients(index, total, problem.grad_passes):
            after_BLKD = problem.feedback(stack, stack.run(slots_BLnD)[:, :, :-1])
            after_BLKD = convergence.kept(before_BLKD, after_BLKD)
        slots_BLnD = torch.cat([token_BL1D, after_BLKD], dim=2)
        if convergence.watch(before_BLKD, after_BLKD):
            break
    hidden_BLnD = stack.run(slots_BLnD, cache=cache)
    return Unrolled(hidden_BLnD[:, :, -1], convergence.telemetry)


def gauss_seidel(problem: Problem, stack: Stack, token_BL1D: Tensor, cache: KVCache | None) -> Unrolled:
    """Stages in order, each with the freshest keys and values there are: of this sweep for the stages before
    it, of the last sweep for those after. (count+1)(K+1) token-passes, and no final pass: the last sweep's
    last stage predicts.
    """
    cache = stack.cache() if cache is None else cache
    total = problem.count + 1
    convergence = Convergence(stack, problem.tolerance)
    thoughts: list[Tensor] = []
    hidden_BL1D = token_BL1D
    for sweep in range(total):
        cache.hold(convergence.done_B)
        before, thoughts, slot_BL1D = thoughts, [], token_BL1D
        with gradients(sweep, total, problem.grad_passes):
            for stage in range(problem.thoughts):
                slot_BL1D = problem.feedback(stack, stack.run(slot_BL1D, first_stage=stage, cache=cache))
                if before:
                    slot_BL1D = convergence.kept(before[stage], slot_BL1D)
                thoughts.append(slot_BL1D)
            predicted_BL1D = stack.run(slot_BL1D, first_stage=problem.thoughts, cache=cache)
            hidden_BL1D = convergence.kept(hidden_BL1D, predicted_BL1D)
        if before and convergence.watch(torch.cat(before, dim=2), torch.cat(thoughts, dim=2)):
            break
    cache.hold(None)
    return Unrolled(hidden_BL1D.squeeze(2), convergence.telemetry)


SOLVERS = {"jacobi": jacobi, "gauss_seidel": gauss_seidel}
