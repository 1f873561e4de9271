"""Predicted memory against that of real tensors; plans against arithmetic by hand."""

import functools
import itertools
import json
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import psutil
import pytest
import torch

import lattice
from lattice import plan_report, preflight
from lattice.arrangement import RESERVE, arranged
from lattice.cli import main
from lattice.components.recurrence.latent_thoughts import Thinking
from lattice.components.recurrence.loop import Loop, Looping
from lattice.draws import Draw
from lattice.hardware import GPU
from lattice.launch import Launch
from lattice.ledger import ledger
from lattice.memory import step_memory, traced_step
from lattice.plan import CHECKPOINTING, Target, cheapest, plan
from lattice.protocols import Recurrence, Unrolled
from lattice.registry import register
from lattice.thought_counts import own_thoughts
from lattice.world import World

BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 4},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
RECURRENCES = {
    "none": {"kind": "none"},
    "pause": {"kind": "pause", "pauses": 2},
    "loop": {"kind": "loop", "loops": 2},
    "ponder": {"kind": "ponder", "steps": 2},
    "depth": {"kind": "depth", "repetitions": {"train": [1, 3]}, "grad_passes": 2},
    "thoughts": {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"train": [1, 3]}},
    "softmax": {"kind": "latent_thoughts", "thoughts": 1, "feedback": "softmax", "top_k": 3},
    "sweeps": {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel"},
}


def recipe_of(backbone="gpt_neox", recurrence="thoughts", **tables):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 96}
    return lattice.load_recipe(
        {
            "backbone": {**BACKBONES[backbone], **sizes, "max_position_embeddings": 64},
            "recurrence": RECURRENCES[recurrence],
            "run": {"batch_tokens": 256, "sequence_tokens": 32, "steps": 10, "device": "cpu"},
            "parallel": {"kind": "fsdp"},
            **tables,
        }
    )


SETTINGS = [list(BACKBONES), list(RECURRENCES), list(CHECKPOINTING), ["fp32", "bf16"], ["causal", "document"]]


def half(settings):
    """Of all combinations those whose places have an even sum: all settings but any one meet in every way."""
    places = itertools.product(*(range(len(of_one)) for of_one in settings))
    return [
        tuple(of_one[at] for of_one, at in zip(settings, place, strict=True))
        for place in places
        if sum(place) % 2 == 0
    ]


def measured(recipe, *, documents=False, accumulated=False):
    """A training step on real tensors, once AdamW has its moments: the model, what was alive, and the bytes
    of the moments."""
    model = lattice.build_model(recipe)
    optimizer = recipe.component("optimizer").build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not accumulated)
    ids = torch.randint(95, (4, 32), generator=torch.Generator().manual_seed(0))
    documents_BL = torch.arange(32).div(20, rounding_mode="floor").repeat(4, 1) if documents else None
    live = traced_step(model, ids, recipe.component("precision"), documents_BL=documents_BL)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return model, live, sum(value.nbytes for value in states if value.dim())


@pytest.mark.parametrize(("backbone", "recurrence", "checkpointing", "precision", "mask"), half(SETTINGS))
def test_predicted_memory(backbone, recurrence, checkpointing, precision, mask):
    """Of a step on fake tensors, and of the same on real ones."""
    tables = {"activation_checkpoint": CHECKPOINTING[checkpointing], "precision": {"kind": precision}}
    tables |= {"mask": {"kind": mask}, "loss": {"kind": "cross_entropy", "chunk_tokens": 64}}
    recipe = recipe_of(backbone, recurrence, **tables)
    predicted = step_memory(recipe, rows=4, length=32)
    model, live, moments = measured(recipe, documents=mask == "document")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert predicted.total == pytest.approx(max(live.peak, 2 * weights) + moments, rel=0.02)
    assert predicted.parameters == weights
    assert predicted.optimizer == moments == 2 * weights
    assert predicted.gradients <= weights


@pytest.mark.parametrize(("backbone", "recurrence", "checkpointing", "precision"), half(SETTINGS[:4]))
def test_predicted_memory_where_gradients_add_up(backbone, recurrence, checkpointing, precision):
    """From the second micro-batch on they are all there from the start."""
    tables = {"activation_checkpoint": CHECKPOINTING[checkpointing], "precision": {"kind": precision}}
    recipe = recipe_of(backbone, recurrence, **tables)
    predicted = step_memory(recipe, rows=4, length=32, micro_batches=3)
    model, live, moments = measured(recipe, accumulated=True)
    assert predicted.total == pytest.approx(live.peak + moments, rel=0.02)
    assert predicted.gradients == sum(parameter.nbytes for parameter in model.parameters())


WEIGHTS = torch.tensor([0.5, 0.25])


@register("recurrence", "test_weighted")
@dataclass(frozen=True, kw_only=True)
class Weighted(Loop):
    """Scales by constants of its module."""

    def build(self, shape):
        return Weighing(self.loops, 1.0)


class Weighing(Looping):
    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        unrolled = super().__call__(stack, ids_BL, draw=draw, cache=cache)
        return Unrolled(WEIGHTS[0] * unrolled.hidden_BLD + WEIGHTS[1:] * unrolled.hidden_BLD)


def test_constants_of_a_module_are_used_in_the_prediction():
    recipe = lattice.load_recipe(recipe_of(recurrence="loop"), ["recurrence.kind=test_weighted"])
    model = lattice.build_model(recipe)
    live = traced_step(model, torch.zeros(4, 32, dtype=torch.int64), recipe.component("precision"))
    predicted = step_memory(recipe, rows=4, length=32)
    assert predicted.total - predicted.optimizer == pytest.approx(live.peak, rel=1e-3)


def test_a_gpu_holds_pairs_of_short_sequences_alone():
    recipe = recipe_of("llama", recurrence="none")
    recipe = lattice.load_recipe(recipe, ["backbone.max_position_embeddings=512", "mask.kind=document"])

    def activations(length, *overrides, gpu):
        return step_memory(lattice.load_recipe(recipe, overrides), rows=2, length=length, gpu=gpu).activations

    plain = activations(512, "mask.kind=causal", gpu=False)
    assert activations(512, gpu=True) == activations(512, "mask.window=64", gpu=True) == plain
    pairs = 2 * 512 * 512  # of all rows, a byte each
    assert activations(512, gpu=False) > plain + pairs
    assert activations(256, gpu=True) == activations(256, gpu=False)


@register("recurrence", "test_growing")
@dataclass(frozen=True, kw_only=True)
class Growing(Loop):
    """More loops the longer it is trained."""

    def build(self, shape):
        return Grown(self.loops, 1.0)


class Grown(Looping):
    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        now = Looping(self.loops if draw is None else min(self.loops, draw.step), self.scale)
        return now(stack, ids_BL, draw=draw, cache=cache)


def test_what_grows_with_the_step_is_predicted_at_the_last_one():
    recipe = recipe_of(recurrence="loop", run={"batch_tokens": 256, "sequence_tokens": 32})

    def activations(kind, steps):
        overrides = [f"recurrence.kind={kind}", "recurrence.loops=3", f"run.steps={steps}"]
        return step_memory(lattice.load_recipe(recipe, overrides), rows=4, length=32).activations

    sizes = [activations("test_growing", steps) for steps in (1, 2, 3, 9)]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]
    assert sizes[3] == activations("loop", 1)


@register("recurrence", "test_heavy_tailed")
@dataclass(frozen=True, kw_only=True)
class HeavyTailed(Loop):
    """As many loops as a distribution gives whose quantiles grow with the number drawn, up to a limit."""

    def build(self, shape):
        return Drawing(self.loops, 1.0)


class Drawing(Looping):
    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        count = self.loops if draw is None else min(self.loops, int(1 / (1 - draw.uniform("loops"))))
        return Looping(count, self.scale)(stack, ids_BL, draw=draw, cache=cache)


def test_what_is_drawn_is_predicted_at_the_most_that_the_run_draws():
    recipe = recipe_of(recurrence="loop", run={"batch_tokens": 256, "sequence_tokens": 32})

    def activations(*overrides):
        return step_memory(lattice.load_recipe(recipe, overrides), rows=4, length=32).activations

    for seed in (0, 1):
        most = max(int(1 / (1 - Draw(seed, step).uniform("loops"))) for step in range(6))
        assert most > int(1 / (1 - Draw(seed, 5).uniform("loops"))), "not what the last step draws"
        run = ("run.steps=6", f"run.seed={seed}")
        drawn = activations("recurrence.kind=test_heavy_tailed", "recurrence.loops=99", *run)
        assert drawn == activations("recurrence.kind=loop", f"recurrence.loops={most}", *run)


def test_float8_is_predicted_without_its_hardware():
    kinds = ({"kind": "bf16"}, {"kind": "float8"})
    bf16, float8 = (step_memory(recipe_of(precision=kind), rows=4, length=32) for kind in kinds)
    assert float8 == bf16


def test_what_is_recomputed_saves_memory():
    """In the order of the method: everything kept, narrow results, inputs of layers, inputs of passes."""
    recipe = recipe_of(run={"batch_tokens": 256, "sequence_tokens": 64})
    sizes = {
        name: step_memory(
            lattice.load_recipe({**recipe.table(), "activation_checkpoint": table}), rows=16, length=64
        ).activations
        for name, table in CHECKPOINTING.items()
    }
    assert 0.75 * sizes["none"] > sizes["selective"] > sizes["block"] > sizes["pass, blocks"]
    assert sizes["selective"] > sizes["pass"] > sizes["pass, blocks"]


def test_plan_by_hand():
    room = 3.6 * 2**20
    target = Target(gpu=GPU(room, 1e12, "toy", 1e9, 1e9), gpus=2, utilization=0.5, reserve=0.0)
    # One sequence a GPU, which no smaller micro-batch divides.
    recipe = lattice.load_recipe(
        recipe_of(), ["run.sequence_tokens=128", "backbone.max_position_embeddings=128"]
    )
    settings = list(plan(recipe, [0, 1], target))
    asked = [(count, kind) for count in (0, 1) for kind in CHECKPOINTING]
    assert [(one.thoughts, one.checkpointing) for one in settings] == asked
    for one in settings:
        costs, again = one.costs, one.costs.repeated_operations
        head = 2 * 64 * 96
        forward = (costs.training_operations - 3 * head) / 3
        low, high = {"none": (0, 0), "selective": (0, 0.6), "block": (0.5, 1), "pass": (1, 1)}.get(
            one.checkpointing, (1.5, 2)
        )
        assert low * forward <= again <= high * forward * (1 + 1e-9)
        done = costs.training_operations + again
        assert one.tokens_per_second == pytest.approx(2 * 0.5e12 / done)
        assert one.gpu_hours == pytest.approx(2 * 2560 / one.tokens_per_second / 3600)
        assert one.days == pytest.approx(one.gpu_hours / 48)
        assert one.fits == (one.memory.total <= room)
        assert one.micro_batch == 1
        weights = 4 * costs.parameters
        assert one.memory.parameters == weights // 2 + (weights if one.gathered else 0)
        assert one.memory.optimizer == weights
        assert one.memory.gradients <= weights // 2 + (weights if one.gathered else 0)
        assert one.memory.gradients >= (weights if one.gathered else 0)
        assert one.gathered or one.memory.total + 2 * weights > room
    fitting = [one for one in settings if one.thoughts == 1 and one.fits]
    assert 0 < len(fitting) < len(CHECKPOINTING)  # otherwise the choice is none
    assert {one.gathered for one in fitting} == {True, False}
    best = cheapest([one for one in settings if one.thoughts == 1])
    assert best.gpu_hours == min(one.gpu_hours for one in fitting)
    assert cheapest([one for one in settings if not one.fits]) is None


@pytest.mark.parametrize(("name", "micro_batch"), [("none", 12), ("pass", 6)])  # of 12 sequences
def test_a_smaller_micro_batch_is_planned_where_the_whole_does_not_fit(name, micro_batch, monkeypatch):
    monkeypatch.setattr("lattice.plan.CHECKPOINTING", {name: CHECKPOINTING[name]})
    run = {"sequence_tokens": 32, "batch_tokens": 384, "micro_batch": micro_batch}
    tables = {"run": run, "activation_checkpoint": CHECKPOINTING[name], "parallel": {"kind": "ddp"}}
    thinking = {"kind": "latent_thoughts", "thoughts": 1, "jacobi": {"train": [1, 1]}}
    recipe = lattice.load_recipe({**recipe_of(**tables).table(), "recurrence": thinking})

    @functools.cache
    def needed(rows):
        return step_memory(recipe, rows=rows, length=32, micro_batches=12 // rows, gpu=True).total

    def planned(room):
        (one,) = plan(recipe, [1], Target(gpu=GPU(room, 1e12, "toy", 1e9, 1e9), reserve=0.0))
        assert one.fits == (one.memory.total <= room)
        return one

    for rows in sorted({1, 3, micro_batch}):
        one = planned(1.05 * needed(rows))
        assert one.fits
        assert one.micro_batch >= rows
        assert micro_batch % one.micro_batch == 0
        assert needed(one.micro_batch) <= one.memory.total <= 1.05 * needed(one.micro_batch)
    none = planned(0.99 * needed(1))
    assert not none.fits
    assert (none.micro_batch, none.memory.total) == (micro_batch, needed(micro_batch))


def test_memory_is_divided_as_the_recipe_says():
    target = Target(gpu=GPU(2**30, 1e12, "toy", 1e9, 1e9), gpus=4)

    def memory(**parallel):
        return next(plan(recipe_of(parallel=parallel), [1], target)).memory

    whole, sharded = memory(kind="ddp"), memory(kind="fsdp")
    assert (whole.optimizer, whole.activations) == (4 * sharded.optimizer, sharded.activations)
    assert whole.parameters < sharded.parameters  # the shard, and all of them gathered
    split = memory(kind="context", degree=2)
    # Twice the sequences at once, and of each the half.
    assert split.activations == pytest.approx(sharded.activations, rel=0.02)
    divided = memory(kind="tensor", degree=2)
    assert divided.activations == pytest.approx(2 * sharded.activations, rel=0.02)


@pytest.mark.parametrize(
    ("run", "gpus", "message"),
    [
        ({"batch_tokens": 96}, 2, "run.batch_tokens = 96: its 3 sequences must divide by 2 GPUs"),
        ({"batch_tokens": 256, "micro_batch": 8}, 2, "run.micro_batch = 8: must divide the 4 sequences"),
    ],
)
def test_batches_that_cannot_be_divided(run, gpus, message):
    recipe = recipe_of(run={"sequence_tokens": 32, **run})
    with pytest.raises(lattice.RecipeError, match=re.escape(message)):
        arranged(recipe, gpus)


def test_command(tmp_path, capsys):
    path, out = tmp_path / "mine.toml", tmp_path / "new" / "plan.jsonl"
    path.write_text(recipe_of().to_toml())
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(path), "--thoughts", "0", "1", "--gpus", "4", "--mfu", "0.3", "--out", str(out)])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "4 x h100-80gb, 30% of 989 TFLOP/s assumed" in shown
    assert "450 GB/s within a node of 8" in shown
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["reshard"] for one in rows[0]["communication"]] == ["step", "pass"]
    assert [row["thoughts"] for row in rows] == [0] * 5 + [1] * 5
    assert all(row["fits"] for row in rows)
    assert rows[0]["costs"]["parameters"] == ledger(recipe_of()).parameters


def test_tables_on_80_columns_break_no_word(broken_words):
    target = Target(gpu=GPU(80 * 2**30, 1e15, "toy", 4e11, 5e10), gpus=2)
    one = next(plan(recipe_of(), [1], target))
    sizes = {"parameters": 64.5, "gradients": 64.5, "optimizer": 12.4, "logits": 0.1, "activations": 1234.5}
    large = replace(one.memory, **{part: round(size * 2**30) for part, size in sizes.items()})
    sent = replace(one.communication[0], shards=512, layer_gathers=640.0, gathered=1.4e12, reduced=3.2e11)
    one = replace(one, memory=large, communication=[sent], micro_batch=16, gathered=False, fits=True)
    settings = [replace(one, checkpointing=kind) for kind in CHECKPOINTING]
    plan_report._show(recipe_of(), settings, target, "toy")
    assert not broken_words()


@pytest.mark.parametrize(
    ("recurrence", "counts"), [("thoughts", [0, 1, 2, 3]), ("none", [0]), ("depth", [1, 2, 3, 4])]
)
def test_without_thoughts_the_recipes_own_and_those_that_it_can_have_are_planned(
    recurrence, counts, tmp_path
):
    path, out = tmp_path / "mine.toml", tmp_path / "plan.jsonl"
    recipe = recipe_of(recurrence=recurrence)
    path.write_text(recipe.to_toml())
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(path), "--out", str(out)])
    assert caught.value.code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["thoughts"] for row in rows] == [count for count in counts for _ in CHECKPOINTING]
    own = {row["costs"]["training_operations"] for row in rows if row["thoughts"] == own_thoughts(recipe)}
    assert own == {ledger(recipe).training_operations}, "as it is, with what its training draws"


def test_a_recurrence_without_a_count_is_planned_as_it_is(monkeypatch):
    recipe = recipe_of(recurrence="pause")
    monkeypatch.setattr(type(recipe.component("recurrence")), "with_thoughts", Recurrence.with_thoughts)
    settings = list(plan(recipe, None, Target(gpu=GPU(2**30, 1e12, "toy", 1e9, 1e9))))
    assert [one.thoughts for one in settings] == [2] * len(CHECKPOINTING)
    assert {one.costs.training_token_passes for one in settings} == {3}


@pytest.mark.parametrize(("parallel", "share"), [(["fsdp"], 1), (["context", "parallel.degree=2"], 2)])
def test_a_rank_that_shares_sequences_has_a_part_of_their_tokens(tmp_path, capsys, parallel, share):
    path = tmp_path / "mine.toml"
    path.write_text(recipe_of().to_toml())
    kind, *options = parallel
    with pytest.raises(SystemExit):
        main(
            ["plan", str(path), "--thoughts", "0", "--gpus", "2", "--set", f"parallel.kind={kind}", *options]
        )
    said = " ".join(capsys.readouterr().out.split())
    recipe = lattice.load_recipe(recipe_of(), [f"parallel.kind={kind}", *options])
    tokens = arranged(recipe, 2).rows * recipe.run.sequence_tokens
    assert f"a rank has {tokens // share:,} tokens at once" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], "gpu 'h100' is not known"),
        (["--gpus", "0"], "gpus = 0: must be at least 1"),
        (["--gpus", "3"], "must divide by 3 GPUs"),
        (["--gpus", "4", "--set", "parallel.kind=single"], "parallel.kind = 'single': is for one process, 4"),
        (["--gpus", "4", "--set", "parallel.kind=tensor", "parallel.degree=3"], "parallel.degree = 3: must"),
        (["--out", "/dev/null/plan.jsonl"], "/dev/null is no directory"),
        (["--mfu", "1.5"], "mfu = 1.5: must be greater than 0 and at most 1"),
        (["--thoughts", "-2"], "thoughts = -2: must be at least 0"),
        (["--thoughts", "1", "--set", "recurrence.kind=none"], "thoughts = 1: recurrence 'none' has none"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    path = tmp_path / "mine.toml"
    path.write_text(recipe_of().to_toml())
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(path), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# ── before a run ──────────────────────────────────────────────────────────────────────────────────
def test_a_run_that_does_not_fit_is_refused(monkeypatch):
    """As soon as its predicted peak is more than there is, with the parts named."""
    recipe = recipe_of(data={"kind": "embedded"}, tokenizer={"kind": "bytes"})
    recipe = lattice.load_recipe(recipe, ["backbone.vocab_size=257"])
    needed = step_memory(recipe, rows=8, length=32).total
    for present, refused in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda present=present: SimpleNamespace(available=present)
        )
        if not refused:
            preflight.check(recipe)
            continue
        with pytest.raises(lattice.RecipeError, match=r"too little memory: .*activations .*lattice plan"):
            preflight.check(recipe)


def test_a_run_gathers_weights_once_a_step_where_the_plan_does(monkeypatch):
    """On a card of which all is free: both leave the same reserve."""
    recipe = recipe_of(data={"kind": "embedded"}, tokenizer={"kind": "bytes"})
    recipe = lattice.load_recipe(recipe, ["backbone.vocab_size=257"])
    alone = step_memory(recipe, rows=4, length=32)
    gathered = recipe.component("parallel").memory(alone, 2, gathered=True).total
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "toy")
    for card, fits in ((1.01 * gathered, False), (gathered / (1 - RESERVE) + 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, card=card: (card, card))
        world = World(Launch(size=2, local_size=2))
        assert preflight.check(recipe, world=world, device=torch.device("cuda")) is fits
        target = Target(gpu=GPU(card, 1e12, "toy", 1e9, 1e9), gpus=2)
        assert next(plan(recipe, [2], target)).gathered is fits


def test_a_recurrence_whose_cost_depends_on_values_is_not_predicted(monkeypatch, capsys, tmp_path):
    recipe = recipe_of(data={"kind": "embedded"}, tokenizer={"kind": "bytes"})
    recipe = lattice.load_recipe(recipe, ["backbone.vocab_size=257"])

    def looks(self, stack, ids_BL, *, draw=None, cache=None):
        return bool(stack.embed(ids_BL).sum() > 0)

    monkeypatch.setattr(Thinking, "__call__", looks)
    preflight.check(recipe)
    message = "recurrence 'latent_thoughts': what it computes depends on values: memory is not predicted"
    assert message in capsys.readouterr().out
    (tmp_path / "mine.toml").write_text(recipe.to_toml())
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path / "mine.toml")])
    assert caught.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
