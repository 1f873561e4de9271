"""Solvers of the thoughts' fixed point, for all tokens at once.

The definition is sequential: z^{i+1}_t = feedback(h^i_t), where h^i_t reads the slots up to (t, i). Both
solvers iterate towards it; it is reached when every slot's inputs are settled, in K(L-1) iterations at most.

Shapes: B batch, L tokens, n stages a token, K thoughts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lattice.cache import KVCache
from lattice.components.recurrence._convergence import Convergence, gradients
from lattice.components.recurrence._feedback import Feedback
from lattice.layers import ALL
from lattice.protocols import Pass, Unrolled
from lattice.stack import Fixed, Stack

NOTHING, LAST, ALL_BUT_LAST = slice(0, 0), slice(-1, None), slice(-1)


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
    token, thoughts_BLKD = stack.fixed(token_BL1D), token_BL1D[:, :, :0]
    for index in range(problem.thoughts):  # warm start: each pass refreshes the thoughts and adds one
        with gradients(index, total, problem.grad_passes):
            thoughts_BLKD = problem.feedback(stack, stack.run(token, thoughts_BLKD))
    for index in range(problem.thoughts, total - 1):
        with gradients(index, total, problem.grad_passes):
            after_BLKD = problem.feedback(stack, stack.run(token, thoughts_BLKD, read=ALL_BUT_LAST))
            after_BLKD = convergence.kept(thoughts_BLKD, after_BLKD)
        before_BLKD, thoughts_BLKD = thoughts_BLKD, after_BLKD
        if convergence.watch(before_BLKD, after_BLKD):
            break
    hidden_BL1D = stack.run(token, thoughts_BLKD, read=LAST, cache=cache)
    return Unrolled(hidden_BL1D.squeeze(2), convergence.telemetry)


def jacobi_passes(thoughts: int, count: int, grad_passes: int | None, mixing: int) -> list[Pass]:
    """What `jacobi` computes; `mixing` are the operations of one feedback."""
    slots = thoughts + 1
    passes = [Pass(stages=stages, operations=mixing * stages) for stages in range(1, slots)]
    passes += [Pass(stages=slots, read=thoughts, operations=mixing * thoughts)] * count
    passes.append(Pass(stages=slots, read=1))
    return _tokens_fixed(_with_gradients(passes, 1, grad_passes))


def gauss_seidel(problem: Problem, stack: Stack, token_BL1D: Tensor, cache: KVCache | None) -> Unrolled:
    """Stages in order, each with the freshest keys and values there are: of this sweep for the stages before
    it, of the last sweep for those after. (count+1)(K+1) token-passes, and no final pass: the last sweep's
    last stage predicts.
    """
    cache = stack.cache() if cache is None else cache
    total = problem.count + 1
    convergence = Convergence(stack, problem.tolerance)
    token, thoughts = stack.fixed(token_BL1D), list[Tensor]()
    hidden_BLrD = token_BL1D
    for sweep in range(total):
        cache.hold(convergence.done_B)
        before, thoughts = thoughts, []
        slot: Tensor | Fixed = token
        with gradients(sweep, total, problem.grad_passes):
            for stage in range(problem.thoughts):
                slot = problem.feedback(stack, stack.run(slot, first_stage=stage, cache=cache))
                if before:
                    slot = convergence.kept(before[stage], slot)
                thoughts.append(slot)
            # A prediction is read of the last sweep alone, or of one that may turn out to be a row's last.
            read = ALL if sweep == total - 1 or problem.tolerance is not None else NOTHING
            predicted_BLrD = stack.run(slot, first_stage=problem.thoughts, read=read, cache=cache)
            hidden_BLrD = convergence.kept(hidden_BLrD, predicted_BLrD)
        if before and convergence.watch(torch.cat(before, dim=2), torch.cat(thoughts, dim=2)):
            break
    cache.hold(None)
    return Unrolled(hidden_BLrD.squeeze(2), convergence.telemetry)


def gauss_seidel_passes(thoughts: int, count: int, grad_passes: int | None, mixing: int) -> list[Pass]:
    """What `gauss_seidel` computes, where it does not stop early."""
    slots, passes = thoughts + 1, list[Pass]()
    for sweep in range(count + 1):
        keys = [stage + 1 if sweep == 0 else slots for stage in range(slots)]
        passes += [Pass(keys=seen, operations=mixing) for seen in keys[:-1]]
        passes.append(Pass(keys=slots, read=None if sweep == count else 0))
    return _tokens_fixed(_with_gradients(passes, slots, grad_passes), every=slots)


def _with_gradients(passes: list[Pass], sweep: int, grad_passes: int | None) -> list[Pass]:
    """Gradients flow through the last `grad_passes` sweeps of as many passes, and always through the last."""
    if grad_passes is None:
        return passes
    first = len(passes) - sweep * grad_passes
    return [replace(one, gradients=index >= first) for index, one in enumerate(passes)]


def _tokens_fixed(passes: list[Pass], every: int = 1) -> list[Pass]:
    """What the first layer makes of the tokens is computed in the first pass over them, and in the first with
    gradients."""
    seen, fixed = set[bool](), list[Pass]()
    for index, one in enumerate(passes):
        known = one.gradients in seen and index % every == 0
        if index % every == 0:
            seen.add(one.gradients)
        fixed.append(replace(one, fixed=int(known)))
    return fixed


class Solver(NamedTuple):
    solve: Callable[[Problem, Stack, Tensor, KVCache | None], Unrolled]
    passes: Callable[[int, int, int | None, int], list[Pass]]


SOLVERS = {
    "jacobi": Solver(jacobi, jacobi_passes),
    "gauss_seidel": Solver(gauss_seidel, gauss_seidel_passes),
}
