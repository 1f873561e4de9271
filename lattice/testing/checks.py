"""The checks. Each returns the smallest counterexample it finds, or None.

Shapes: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from safetensors.torch import load, save

from lattice.draws import Draw
from lattice.ledger import ledger
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.recipe import load_recipe
from lattice.testing.counted import operations, slots_of
from lattice.testing.subject import (
    BACKBONES,
    CONTEXT,
    EXACT,
    LAYERS,
    VOCABULARY,
    Subject,
    difference,
    padded,
    small_shapes,
    stepwise,
)

DRAWS = 48
NEAR = 100
"""Tolerances by which early stopping may change the logits: what is left after an iteration of which each
step leaves 99 % of the distance."""


def shapes(subject: Subject) -> str | None:
    """Logits are (B, L, V) and finite, for one token and for a whole context."""
    model = subject.model()
    for rows, length in [*small_shapes(), (1, CONTEXT)]:
        logits = model(subject.ids(rows, length)).logits
        if logits.shape != (rows, length, VOCABULARY):
            return f"B={rows}, L={length}: logits are {tuple(logits.shape)}, not {(rows, length, VOCABULARY)}"
        if not torch.isfinite(logits).all():
            return f"B={rows}, L={length}: logits are not finite"
    return None


def causality(subject: Subject) -> str | None:
    """No logits depend on a later token, at evaluation or in a training step."""
    model = subject.model(subject.without_stop)
    for draw in (None, Draw(0, 1)):
        model.train(draw is not None)
        for length in (2, 3, 4, 6):
            ids = subject.ids(1, length)
            before = model(ids, draw=draw).logits
            for at in range(1, length):
                changed = ids.clone()
                changed[0, at] = next(int(i) for i in subject.ids(1, 64, seed=1)[0] if i != ids[0, at])
                gap = (model(changed, draw=draw).logits - before)[0, :at].abs().amax(dim=-1)
                if gap.max() > EXACT:
                    whose = f"the logits of token {int(gap.argmax())} by {gap.max():.1e}"
                    when = "" if draw is None else ", in a training step"
                    return f"L={length}{when}: changing token {at} changes {whose}"
    return None


def parallel_and_sequential(subject: Subject) -> str | None:
    """The parallel evaluation is that of one token after the other, exactly or with iterations enough;
    where it stops early, it is near what it is without."""
    for rows, length in small_shapes():
        component, ids = subject.converged(length), subject.ids(rows, length)
        if component is not None:  # else an approximation by its own word, and with nothing to converge by
            model = subject.model(component)
            gap = difference(model(ids).logits, stepwise(model, ids))
            if gap > EXACT:
                return f"B={rows}, L={length}: parallel and step-by-step logits differ by {gap:.1e}"
        if subject.tolerance is not None:
            whole = subject.model(subject.without_stop)(ids).logits
            gap = float((subject.model()(ids).logits - whole).norm() / whole.norm())
            if gap > NEAR * subject.tolerance:
                stopped = f"stopping at tolerance = {subject.tolerance:g} changes the logits"
                return f"B={rows}, L={length}: {stopped} by {gap:.1e}, relatively"
    return None


def cached_decoding(subject: Subject) -> str | None:
    """Decoding on from a prefilled cache gives what evaluating the whole from the start gives."""
    for rows, length in small_shapes():
        component = subject.converged(length)
        exact = component is not None
        model, ids = subject.model(component or subject.without_stop), subject.ids(rows, length)
        for prompt in range(1, length):
            whole = model(ids).logits if exact else stepwise(model, ids)
            logits, cache = model.prefill(ids[:, :prompt], parallel=exact)
            columns = [logits] + [model.step(ids[:, at : at + 1], cache) for at in range(prompt, length)]
            gap = difference(torch.stack(columns, dim=1), whole[:, prompt - 1 :])
            if gap > EXACT:
                return f"B={rows}, prompt of {prompt}, {length - prompt} more: logits differ by {gap:.1e}"
    return None


def batch_and_padding(subject: Subject) -> str | None:
    """A row of a padded batch gets what it gets alone, evaluated at once or decoded, and in a training step
    nothing from padding and other rows."""
    model, trained = subject.model(), subject.model().train()
    for lengths in ([1, 2], [3, 2], [1, 4, 6]):
        longest = max(lengths)
        ids = subject.ids(len(lengths), longest)
        for left in (True, False):
            where = f"lengths {lengths}, padded on the {'left' if left else 'right'}"
            mask = padded(lengths, left=left)
            ways: dict[str, Any] = {"forward": model(ids, attention_mask=mask).logits}
            if left:
                ways["decoding"] = stepwise(model, ids, mask)
            for row, real in enumerate(mask.bool()):
                alone = ids[row : row + 1, real]
                for way, together in ways.items():
                    own = model(alone).logits if way == "forward" else stepwise(model, alone)
                    gap = difference(together[row, real], own[0])
                    if gap > EXACT:
                        return f"{where}: {way} of row {row} differs from the row alone by {gap:.1e}"
                kept = torch.zeros_like(mask, dtype=torch.bool)
                kept[row] = real
                gap = _from_others(subject, trained, ids, kept, attention_mask=mask)
                if gap > EXACT:
                    others = "changing padding and other rows changes"
                    return f"{where}, in a training step: {others} the logits of row {row} by {gap:.1e}"
    return None


def documents(subject: Subject) -> str | None:
    """Under the document mask a packed document gets what it gets alone, and in a training step nothing from
    other documents."""
    component, mask = subject.without_stop, {"kind": "document"}
    model, trained = subject.model(component, mask=mask), subject.model(component, mask=mask).train()
    for numbers in ([0, 1], [0, 0, 1], [0, 0, 1, 1, 1, 2]):
        ids, document = subject.ids(1, len(numbers)), torch.tensor([numbers])
        packed = model(ids, documents=document).logits
        for number in sorted(set(numbers)):
            inside = document == number
            gap = difference(packed[inside], model(ids[inside][None]).logits[0])
            if gap > EXACT:
                return f"documents {numbers}: logits of document {number} differ from it alone by {gap:.1e}"
            gap = _from_others(subject, trained, ids, inside, documents=document)
            if gap > EXACT:
                others = f"changing others changes the logits of document {number}"
                return f"documents {numbers}, in a training step: {others} by {gap:.1e}"
    return None


def _from_others(
    subject: Subject, model: LanguageModel, ids: torch.Tensor, kept: torch.Tensor, **inputs: torch.Tensor
) -> float:
    """By how much the logits of the tokens `kept` (B, L) change in a training step when all others are
    replaced. They are not compared with those alone: what is drawn for noise may depend on the shape."""
    rows, length = ids.shape
    other = torch.where(kept, ids, subject.ids(rows, length, seed=1))
    before, after = (model(tokens, draw=Draw(0, 1), **inputs).logits[kept] for tokens in (ids, other))
    return difference(before, after)


def branches(subject: Subject) -> str | None:
    """Continuations that share a row with their context get what they get alone, where rows may branch."""
    if not subject.component.rows_may_branch:
        return None
    model = subject.model()
    for numbers in ([0, 1, 2], [0, 0, 1, 1, 2], [0, 0, 0, 1, 2, 2, 3]):
        ids, branch = subject.ids(1, len(numbers)), torch.tensor([numbers])
        together = model.hidden_states(ids, branches=branch)
        for number in range(1, max(numbers) + 1):
            text = (branch[0] == 0) | (branch[0] == number)
            gap = difference(together[0, text], model.hidden_states(ids[:, text])[0])
            if gap > EXACT:
                return f"branches {numbers}: hidden states of continuation {number} differ by {gap:.1e}"
    return None


def gradients(subject: Subject) -> str | None:
    """The loss of a training step has a finite gradient for every parameter."""
    model, ids = subject.model(), subject.ids(2, 6)
    reached: set[str] = set()
    for step in range(4):
        model.zero_grad()
        loss = model(ids, targets=ids.roll(-1, 1), draw=Draw(0, step)).loss
        assert loss is not None
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if not torch.isfinite(parameter.grad).all():
                return f"B=2, L=6, step {step}: the gradient of {name} is not finite"
            if parameter.grad.abs().max() > 0:
                reached.add(name)
    missing = [name for name, _ in model.named_parameters() if name not in reached]
    return f"B=2, L=6: no gradient reaches {', '.join(missing[:3])}" if missing else None


def determinism(subject: Subject) -> str | None:
    """A forward is a function of its inputs; the random choices of training come from the draw alone."""
    model, ids = subject.model(), subject.ids(2, 4)
    for name, draw in (("evaluation", None), ("training with one draw", Draw(0, 3))):
        model.train(draw is not None)
        torch.manual_seed(1)
        first = model(ids, draw=draw).logits
        torch.manual_seed(2)
        gap = difference(first, model(ids, draw=draw).logits)
        if gap > 0:
            return f"B=2, L=4, {name}: two forwards differ by {gap:.1e}"
    return None


def cost(subject: Subject) -> str | None:
    """Token-passes, operations and slots are as declared."""
    model, rows, length = subject.model(), 1, 3
    ids, shape = subject.ids(rows, length), model.shape
    declared = subject.component.token_passes(shape, training=False)
    counted = _token_passes(model, ids, None)
    early = getattr(subject.component, "tolerance", None) is not None
    if (counted > declared + 1e-6) if early else abs(counted - declared) > 1e-6:
        return f"evaluation takes {counted:g} token-passes, declared are {declared:g}"
    drawn = [_token_passes(model, ids, Draw(0, step)) for step in range(DRAWS)]
    declared, mean = subject.component.token_passes(shape, training=True), statistics.mean(drawn)
    if abs(mean - declared) > 5 * statistics.stdev(drawn) / DRAWS**0.5 + 1e-6:
        return f"training takes {mean:g} token-passes in the mean of {DRAWS} steps, declared are {declared:g}"
    if not early:
        recipe = load_recipe(
            {"backbone": BACKBONES[subject.backbone], "recurrence": to_table(subject.component)}
        )
        with torch.no_grad():
            done = operations(lambda: model(ids)) / ids.numel()
        costs = ledger(recipe, length=length).evaluation_operations
        if abs(done - costs) > 0.01 * done:
            return f"evaluation takes {done:g} operations a token at L={length}, declared are {costs:g}"
    _, cache = model.prefill(ids)
    assert cache.slots is not None
    entries = len(cache.slots.stage_S) / length
    if entries != subject.component.slots:
        return f"a token takes {entries:g} slots of the cache, declared are {subject.component.slots}"
    return None


def _token_passes(model: LanguageModel, ids: torch.Tensor, draw: Draw | None) -> float:
    counted: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, inputs: counted.append(slots_of(inputs)))
        for block in model.decoder.blocks
    ]
    with torch.no_grad():
        model(ids, draw=draw)
    for hook in hooks:
        hook.remove()
    return sum(counted) / LAYERS / ids.shape[1]


def save_and_load(subject: Subject) -> str | None:
    """Options survive a recipe, and weights a file: the model that comes back gives the same logits."""
    table = to_table(subject.component)
    again = load_recipe({"recurrence": table}).component("recurrence")
    if again != subject.component:
        return f"the options {table} come back from a recipe as {to_table(again)}"
    model, other, ids = subject.model(), subject.model(seed=6), subject.ids(2, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        other.load_state_dict(load(save(state)))
    except RuntimeError as error:
        return f"weights do not load: {error}"
    gap = difference(model(ids).logits, other(ids).logits)
    return f"B=2, L=4: logits differ by {gap:.1e} after the weights were loaded" if gap > 0 else None
