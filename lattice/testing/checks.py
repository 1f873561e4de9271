"""The checks. Each returns the smallest counterexample it finds, or None.

Shapes: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from safetensors.torch import load, save

from lattice.attention_mask import allowed, block_mask
from lattice.draws import Draw
from lattice.ledger import ledger, operations_of, training_passes
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.protocols import Recurrence
from lattice.recipe import load_recipe
from lattice.registry import lookup
from lattice.slots import Slots, Tokens
from lattice.testing.counted import operations, slots_of
from lattice.testing.subject import (
    BATCHES,
    CONTEXT,
    EXACT,
    LAYERS,
    VOCABULARY,
    Subject,
    difference,
    outcome,
    padded,
    shown,
    stepwise,
)

DRAWS = tuple(
    Draw(seed, step) for first in (0, 10**6) for step in range(first, first + 12) for seed in (0, 1)
)
"""Over which the cost of a training step is the mean: at the start and late, two draws of each step."""
THOUGHTS = 4
"""Numbers that are asked for, from 0 on."""
STEPS = tuple(Draw(0, step) for step in (1, 2, 10**6))
"""Training steps, a late one among them: what a recurrence does may change in the course of a run."""
NEAR = 100
"""Tolerances by which early stopping may change the logits: what is left after an iteration of which each
step leaves 99 % of the distance."""


def shapes(subject: Subject) -> str | None:
    """Logits are (B, L, V) and finite, for one token and for a whole context; telemetry is of numbers and
    vectors, in a training step too."""
    model = subject.model()
    model(subject.ids(*BATCHES[0]), draw=STEPS[0])
    for rows, length in BATCHES:
        logits = model(subject.ids(rows, length)).logits
        if logits.shape != (rows, length, VOCABULARY):
            return f"B={rows}, L={length}: logits are {tuple(logits.shape)}, not {(rows, length, VOCABULARY)}"
        if not torch.isfinite(logits).all():
            return f"B={rows}, L={length}: logits are not finite"
    return None


def causality(subject: Subject) -> str | None:
    """No logits depend on a later token, at evaluation or in a training step, and nothing that a recurrence
    adds to the loss does."""
    model = subject.model(subject.without_stop)
    for draw in (None, *STEPS):
        model.train(draw is not None)
        for length in (2, 4, CONTEXT):
            ids = subject.rotations(length)
            before = outcome(model, ids, draw)
            few = (length // 3, length // 2 - 1, length - 1)  # none of them the first of the same chunks
            for at in few if length == CONTEXT else range(1, length):
                changed = ids.clone()
                changed[:, at] = ids[:, at].roll(1)  # to what is before it, so that a token comes twice
                for what, after in outcome(model, changed, draw).items():
                    gap = (after - before[what])[:, :at].abs().amax(dim=-1)
                    if gap.max() > EXACT:
                        row, token = divmod(int(gap.argmax()), at)
                        change = f"from id {int(ids[row, at])} to {int(changed[row, at])}"
                        whose = f"{what} of token {token} by {shown(float(gap.max()))}"
                        when = "" if draw is None else f", in training step {draw.step}"
                        return f"L={length}{when}: changing token {at} {change} changes {whose}"
    return None


def parallel_and_sequential(subject: Subject) -> str | None:
    """The parallel evaluation is that of one token after the other, exactly or with iterations enough;
    where it stops early, it is near what it is without."""
    for rows, length in BATCHES:
        model, ids = subject.model(subject.converged(length)), subject.ids(rows, length)
        gap = difference(model(ids).logits, stepwise(model, ids))
        if gap > EXACT:
            return f"B={rows}, L={length}: parallel and step-by-step logits differ by {shown(gap)}"
        if subject.tolerance is not None:
            whole = subject.model(subject.without_stop)(ids).logits
            gap = float((subject.model()(ids).logits - whole).norm() / whole.norm())
            if gap > NEAR * subject.tolerance:
                stopped = f"stopping at tolerance = {subject.tolerance:g} changes the logits"
                return f"B={rows}, L={length}: {stopped} by {shown(gap)}, relatively"
    return None


def cached_decoding(subject: Subject) -> str | None:
    """Decoding on from a prefilled cache gives what evaluating the whole from the start gives."""
    for rows, length in BATCHES:
        model, ids = subject.model(subject.converged(length)), subject.ids(rows, length)
        whole = model(ids).logits
        for prompt in (CONTEXT // 2,) if length == CONTEXT else range(1, length):
            logits, cache = model.prefill(ids[:, :prompt], parallel=True)
            columns = [logits] + [model.step(ids[:, at : at + 1], cache) for at in range(prompt, length)]
            gap = difference(torch.stack(columns, dim=1), whole[:, prompt - 1 :])
            if gap > EXACT:
                return f"B={rows}, prompt of {prompt}, {length - prompt} more: logits differ by {shown(gap)}"
    return None


def batch_and_padding(subject: Subject) -> str | None:
    """A row of a padded batch gets what it gets alone, evaluated at once or decoded, and in a training step
    nothing from padding and other rows."""
    model, trained = subject.model(), subject.model().train()
    # Rows of several tokens are shifted by 2 and by 5, and nearly fill the context.
    for lengths in ([1, 2], [5, 2, 7], [CONTEXT - 5, CONTEXT - 2, CONTEXT]):
        longest = max(lengths)
        ids = subject.ids(len(lengths), longest)
        for left in (True, False):
            where = f"lengths {lengths}, padded on the {'left' if left else 'right'}"
            mask = padded(lengths, left=left)
            ways: dict[str, Any] = {"forward": model(ids, attention_mask=mask).logits}
            if left and longest < CONTEXT:
                ways["decoding"] = stepwise(model, ids, mask)
            for row, real in enumerate(mask.bool()):
                alone = ids[row : row + 1, real]
                for way, together in ways.items():
                    own = model(alone).logits if way == "forward" else stepwise(model, alone)
                    gap = difference(together[row, real], own[0])
                    if gap > EXACT:
                        return f"{where}: {way} of row {row} differs from the row alone by {shown(gap)}"
            each_row = torch.eye(len(lengths), dtype=torch.bool)[:, :, None] & mask.bool()
            changes = _from_others(subject, trained, ids, each_row, attention_mask=mask)
            for row, (gap, what) in enumerate(changes):
                if gap > EXACT:
                    others = "changing padding and other rows changes"
                    return f"{where}, in a training step: {others} {what} of row {row} by {shown(gap)}"
    return None


def documents(subject: Subject) -> str | None:
    """Under the document mask a packed document gets what it gets alone, and in a training step nothing from
    other documents."""
    component = subject.without_stop
    mask = to_table(subject.mask) if subject.mask.needs_documents else {"kind": "document"}
    model, trained = subject.model(component, mask=mask), subject.model(component, mask=mask).train()
    for numbers in ([0, 1], [0, 0, 1], [0, 0, 1, 1, 1, 2], [0] * 5 + [1] * 17 + [2] * (CONTEXT - 22)):
        ids = subject.rotations(len(numbers))[: 2 if len(numbers) == CONTEXT else None]
        document = torch.tensor(numbers).expand_as(ids)
        packed = model(ids, documents=document).logits
        each_document = torch.stack([document == number for number in sorted(set(numbers))])
        for number, inside in enumerate(each_document):
            gap = difference(packed[:, inside[0]], model(ids[:, inside[0]]).logits)
            if gap > EXACT:
                return (
                    f"documents {numbers}: logits of document {number} differ from it alone by {shown(gap)}"
                )
        changes = _from_others(subject, trained, ids, each_document, documents=document)
        for number, (gap, what) in enumerate(changes):
            if gap > EXACT:
                others = f"changing others changes {what} of document {number}"
                return f"documents {numbers}, in a training step: {others} by {shown(gap)}"
    return None


def _from_others(
    subject: Subject, model: LanguageModel, ids: torch.Tensor, parts: torch.Tensor, **inputs: torch.Tensor
) -> list[tuple[float, str]]:
    """By how much what comes of each of the `parts` (…, B, L) of the tokens changes in some training step
    when all others are replaced, and what. It is not compared with the part alone: what is drawn for noise
    may depend on the shape."""
    rows, length = ids.shape
    others = subject.ids(rows, length, seed=1)
    changes = [(0.0, "")] * len(parts)
    for draw in STEPS:
        before = outcome(model, ids, draw, **inputs)
        for index, kept in enumerate(parts):
            after = outcome(model, torch.where(kept, ids, others), draw, **inputs)
            gaps = [(difference(before[what][kept], after[what][kept]), what) for what in before]
            changes[index] = max(changes[index], *gaps)
    return changes


def pairs(subject: Subject) -> str | None:
    """The mask says of one pair of slots, as FlexAttention asks it on a GPU, what it says of all at once."""
    mask, ids = subject.mask, subject.ids(2, 7)
    document = torch.tensor([0, 0, 1, 1, 1, 2, 2]).expand_as(ids) if mask.needs_documents else None
    for lengths in ([7, 7], [4, 7]):
        present = None if lengths == [7, 7] else padded(lengths, left=True)
        slots = Slots.interleaved(Tokens.of(ids, present, document), subject.component.slots)
        seen = allowed(mask, slots, slots)
        if seen is None:
            continue
        one_pair = block_mask(mask, slots, slots).mask.mask_mod
        for place in product(range(2), *(range(len(slots.stage_S)) for _ in "qk")):
            row, query, key = map(torch.tensor, place)
            if bool(one_pair(row, torch.tensor(0), query, key)) != bool(seen.expand(2, -1, -1)[place]):
                return f"lengths {lengths}: of slots {place[1]} and {place[2]} of row {place[0]} it differs"
    return None


def branches(subject: Subject) -> str | None:
    """Continuations that share a row with their context get what they get alone, where rows may branch."""
    if not subject.component.rows_may_branch:
        return None
    model = subject.model()
    for numbers in ([0, 1, 2], [0, 0, 1, 1, 2], [0, 0, 0, 1, 2, 2, 3]):
        ids, branch = subject.rotations(len(numbers)), torch.tensor(numbers)
        together = model.hidden_states(ids, branches=branch.expand_as(ids))
        for number in range(1, max(numbers) + 1):
            text = (branch == 0) | (branch == number)
            gap = difference(together[:, text], model.hidden_states(ids[:, text]))
            if gap > EXACT:
                return f"branches {numbers}: hidden states of continuation {number} differ by {shown(gap)}"
    return None


def gradients(subject: Subject) -> str | None:
    """The loss of a training step has a finite gradient for every parameter."""
    rows, length = BATCHES[-1]
    model, ids = subject.model(), subject.ids(rows, length)
    reached: set[str] = set()
    for draw in (Draw(0, 0), *STEPS):
        model.zero_grad()
        loss = model(ids, targets=ids.roll(-1, 1), draw=draw).objective
        assert loss is not None
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if not torch.isfinite(parameter.grad).all():
                return f"B={rows}, L={length}, step {draw.step}: the gradient of {name} is not finite"
            if parameter.grad.abs().max() > 0:
                reached.add(name)
    missing = [name for name, _ in model.named_parameters() if name not in reached]
    return f"B={rows}, L={length}: no gradient reaches {', '.join(missing[:3])}" if missing else None


def determinism(subject: Subject) -> str | None:
    """A forward is a function of its inputs; the random choices of training come from the draw alone."""
    model, ids = subject.model(), subject.ids(2, 4)
    for draw in (None, *STEPS):
        name = "evaluation" if draw is None else f"training step {draw.step}"
        model.train(draw is not None)
        torch.manual_seed(1)
        first = outcome(model, ids, draw)
        torch.manual_seed(2)
        for what, second in outcome(model, ids, draw).items():
            if (gap := difference(first[what], second)) > 0:
                return f"B=2, L=4, {name}: two forwards differ by {shown(gap)} in {what}"
    return None


def cost(subject: Subject) -> str | None:
    """Token-passes, operations, slots and numbers in the cache are as declared: at evaluation, in a training
    step with its backward pass, and in decoding; and what activation checkpointing computes again is."""
    for when, what, counted, declared in _costs(subject):
        missed = [one - other for one, other in zip(counted, declared, strict=True)]
        # Five standard errors, from what two draws of the same step differ by.
        chance = 5 * math.hypot(*map(operator.sub, missed[::2], missed[1::2])) / len(missed)
        # The ledger lets all slots of a decoded token see each other: half a token's too many, at most.
        rounding = 1 / (2 * CONTEXT) if (when, what) == ("decoding", "operations") else 1e-6
        mean, said = statistics.mean(counted), statistics.mean(declared)
        if abs(statistics.mean(missed)) > chance + rounding * mean:
            draws = f" in the mean of {len(counted)} draws" if len(counted) > 1 else ""
            return f"{when} takes {mean:g} {what} a token{draws}, declared are {said:g}"
    return None


def thoughts(subject: Subject) -> str | None:
    """Where it can be given another number of thoughts, each number is a recurrence of its own, of more
    token-passes than the one before, whatever number it had."""
    found: dict[int, Recurrence] = {}
    for count in range(THOUGHTS):
        with suppress(ValueError):  # there may be no such count
            found[count] = subject.component.with_thoughts(count)
    costs: dict[int, float] = {}
    for count, one in found.items():
        for other, from_other in found.items():
            if (again := from_other.with_thoughts(count)) != one:
                ways = f"with_thoughts({count}) is {to_table(one)}, and {to_table(again)}"
                return f"{ways} after with_thoughts({other})"
        costs[count] = ledger(subject.recipe(one), length=CONTEXT).evaluation_token_passes
    for fewer, more in pairwise(costs):
        if costs[more] <= costs[fewer]:
            taken = f"{costs[fewer]:g} token-passes a token with {fewer}, {costs[more]:g} with {more}"
            return f"evaluation takes {taken}"
    return None


def _costs(subject: Subject) -> Iterator[tuple[str, str, list[float], list[float]]]:
    """When, of what, how much was counted for a token, in one call or in several, and what is declared of
    each."""
    component, length = subject.without_stop, 3
    model, recipe, ids = subject.model(component), subject.recipe(component), subject.ids(1, length)
    costs, evaluate = ledger(recipe, length=length), partial(model, ids)
    passes = costs.evaluation_token_passes
    yield "evaluation", "token-passes", [_slots(model, evaluate) / length], [passes]
    if subject.tolerance is not None:
        stopping = subject.model()
        stopped = max(_slots(stopping, partial(stopping, ids)) / length, passes)
        yield "evaluation with a tolerance", "token-passes", [stopped], [passes]
    yield "evaluation", "operations", [operations(evaluate) / length], [costs.evaluation_operations]
    training = [training_passes(recipe, [draw.step]) for draw in DRAWS]
    # Steps whose forwards send as many slots through the layers, with as many operations, are taken to be
    # alike: one of each is counted.
    alike = [_slots_and_operations(model, partial(evaluate, draw=draw)) for draw in DRAWS]
    declared = [sum(one.token_passes(LAYERS) for one in passes) for passes in training]
    yield "training", "token-passes", [slots / length for slots, _ in alike], declared
    steps = {
        forward: operations(partial(_train, model, ids, draw)) / length
        for forward, draw in dict(zip(alike, DRAWS, strict=True)).items()
    }
    declared = [operations_of(recipe, passes, length=length, backward=True) for passes in training]
    yield "training", "operations", [steps[forward] for forward in alike], declared
    # This is for backbones. Of other recurrences the last product of a pass is not always computed again.
    if component == lookup("recurrence", "none")():
        for kind in ("block", "selective"):
            checkpointing: dict[str, Any] = {"activation_checkpoint": {"kind": kind}}
            again = subject.model(component, **checkpointing)
            counted = operations(partial(_train, again, ids, DRAWS[0])) / length - steps[alike[0]]
            declared_again = ledger(subject.recipe(component, **checkpointing), length=length)
            what = f"operations again with activation_checkpoint.kind = '{kind}'"
            yield "training", what, [counted], [declared_again.repeated_operations]
    prompt, costs = subject.ids(1, CONTEXT - 2), ledger(recipe, length=CONTEXT)
    _, cache = model.prefill(prompt, parallel=True)
    slots = 0 if cache.slots is None else len(cache.slots.stage_S)
    yield "the cache that stack.run is given", "slots", [slots / len(prompt[0])], [component.slots]
    decode, before = partial(model.step, ids[:, :1], cache), cache.numbers
    yield "decoding", "token-passes", [_slots(model, decode)], [costs.inference_token_passes]
    yield "decoding", "numbers in the cache", [cache.numbers - before], [costs.cached_numbers]
    yield "decoding", "operations", [operations(decode)], [costs.inference_operations]


def _train(model: LanguageModel, ids: torch.Tensor, draw: Draw) -> None:
    with torch.enable_grad():
        loss = model(ids, targets=ids, draw=draw).objective
        assert loss is not None
        loss.backward()


def _slots(model: LanguageModel, call: Callable[[], Any]) -> float:
    """Slots of a row that `call` sends through all layers."""
    counted: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, inputs: counted.append(slots_of(inputs)))
        for block in model.decoder.blocks
    ]
    call()
    for hook in hooks:
        hook.remove()
    return sum(counted) / LAYERS


def _slots_and_operations(model: LanguageModel, call: Callable[[], Any]) -> tuple[float, int]:
    """Both, of one call."""
    done: list[int] = []
    return _slots(model, lambda: done.append(operations(call))), done[0]


def save_and_load(subject: Subject) -> str | None:
    """Options survive a recipe, and weights a file: the model that comes back gives the same logits."""
    recipe = subject.recipe()
    reloaded = load_recipe(recipe.table())
    for role in ("recurrence", "backbone", "mask"):
        one, again = recipe.component(role), reloaded.component(role)
        if again != one:
            return f"the options {to_table(one)} come back from a recipe as {to_table(again)}"
    model, other, ids = subject.model(), subject.model(seed=6), subject.ids(2, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        other.load_state_dict(load(save(state)))
    except RuntimeError as error:
        return f"weights do not load: {error}"
    gap = difference(model(ids).logits, other(ids).logits)
    return f"B=2, L=4: logits differ by {shown(gap)} after the weights were loaded" if gap > 0 else None
