"""The same recipe gives the same losses on any number of ranks, however it is spread over them."""

import re
from pathlib import Path

import pytest
from ranks import losses, metrics, recipe_of, train_on

import lattice

KINDS = {
    "none": {"kind": "none"},
    "pause": {"kind": "pause", "pauses": 2},
    "loop": {"kind": "loop", "loops": 2},
    "ponder": {"kind": "ponder", "steps": 2},
    "hidden_ponder": {"kind": "hidden_ponder", "steps": 2},
    "depth": {"kind": "depth", "coda": 0},
    "jacobi": {"kind": "latent_thoughts", "thoughts": 2},
    "sweeps": {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel"},
    "softmax": {"kind": "latent_thoughts", "thoughts": 1, "feedback": "softmax"},
}
SUPERVISED, HALTING = (Path(__file__).parents[1] / name for name in ("supervised.py", "halting.py"))
STEP = {"kind": "fsdp", "reshard": "step"}
PASS = {"kind": "fsdp", "reshard": "pass"}


def cases_of_two():
    cases = {f"kind_{name}": recipe_of(recurrence=table, parallel=STEP) for name, table in KINDS.items()}
    for name, table in {
        "selective": {"kind": "selective"},
        "block": {"kind": "block"},
        "pass": {"kind": "pass"},
        "both": {"kind": "pass", "blocks": True},
    }.items():
        cases[f"recompute_{name}"] = recipe_of(parallel=PASS, activation_checkpoint=table)
    cases["recompute_step"] = recipe_of(parallel=STEP, activation_checkpoint={"kind": "pass"})
    cases["ddp"] = recipe_of(parallel={"kind": "ddp"})
    cases["compiled"] = recipe_of(
        run={"steps": 2}, parallel=STEP, compile={"kind": "block", "backend": "aot_eager"}
    )
    cases["tensor"] = recipe_of(parallel={"kind": "tensor", "degree": 2})
    llama = {
        **recipe_of()["backbone"],
        "kind": "llama",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    del llama["rotary_pct"]
    for name in ("jacobi", "sweeps", "loop", "softmax", "pause"):
        table = {"kind": "context", "degree": 2, "reshard": "step"}
        cases[f"context_{name}"] = recipe_of(recurrence=KINDS[name], parallel=table)
    packed = {"kind": "document", "thoughts": "last"}
    cases["context_documents"] = recipe_of(mask=packed, parallel={"kind": "context", "degree": 2})
    cases["llama"] = recipe_of(backbone=llama, parallel=STEP)
    cases["llama_tensor"] = recipe_of(backbone=llama, parallel={"kind": "tensor", "degree": 2})
    for name, parallel in {"step": STEP, "pass": PASS, "ddp": {"kind": "ddp"}}.items():
        cases[f"accumulate_{name}"] = recipe_of(run={"micro_batch": 1}, parallel=parallel)
    for name, parallel in {"step": STEP, "ddp": {"kind": "ddp"}}.items():
        supervised = recipe_of(
            run={"micro_batch": 1}, recurrence={"kind": "test_supervised"}, parallel=parallel
        )
        cases[f"auxiliary_loss_{name}"] = {**supervised, "imports": [str(SUPERVISED)]}
    halting = recipe_of(
        recurrence={"kind": "test_halting"}, parallel={"kind": "context", "degree": 2, "reshard": "step"}
    )
    cases["auxiliary_loss_context"] = {**halting, "imports": [str(HALTING)]}
    cases["long"] = recipe_of(run={"steps": 50}, parallel=STEP)
    for count in (1, 5):
        jacobi = {"train": [count, count], "eval": 1}
        table = {"kind": "latent_thoughts", "thoughts": 1, "jacobi": jacobi}
        cases[f"count_{count}"] = recipe_of(run={"steps": 2}, recurrence=table, parallel=STEP)
    float8 = {"kind": "float8", "emulate": True, "min_features": 16}
    cases["float8"] = recipe_of(run={"steps": 3}, precision=float8, parallel=STEP)
    cases["bf16"] = recipe_of(precision={"kind": "bf16"}, parallel=PASS)
    return cases


def cases_of_four():
    return {
        "fsdp": recipe_of(parallel=STEP),
        "long": recipe_of(run={"steps": 50}, parallel={"kind": "ddp"}),
        "replicas": recipe_of(parallel={**STEP, "replicas": 2}, run={"micro_batch": 1}),
        "replicas_pass": recipe_of(parallel={**PASS, "replicas": 2}, run={"micro_batch": 1}),
        "context": recipe_of(
            parallel={"kind": "context", "degree": 2, "reshard": "pass"},
            activation_checkpoint={"kind": "pass"},
            run={"micro_batch": 2},
        ),
        "tensor_fsdp": recipe_of(parallel={"kind": "tensor", "degree": 2, "reshard": "step"}),
    }


def alone(recipe):
    """The same on one process. How the ranks are arranged is no part of it, nor are the parts of a batch."""
    run = {name: value for name, value in recipe["run"].items() if name != "micro_batch"}
    return {**recipe, "run": run, "parallel": {"kind": "single"}}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, train_on(2, cases_of_two(), folder)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, train_on(4, cases_of_four(), folder)


@pytest.mark.parametrize(
    ("ranks", "name"), [*((2, n) for n in cases_of_two()), *((4, n) for n in cases_of_four())]
)
def test_losses_are_those_of_one_process(ranks, name, tmp_path, request):
    folder, said = request.getfixturevalue("of_two" if ranks == 2 else "of_four")
    recipe = (cases_of_two() if ranks == 2 else cases_of_four())[name]
    assert {one.get("message") for one in said[name]} == {None}
    lattice.train(alone(recipe), out=tmp_path / "alone")
    close = 2e-2 if "precision" in recipe else 1e-5
    here, there = metrics(tmp_path / "alone"), metrics(folder / name)
    assert [row["step"] for row in there] == [row["step"] for row in here]
    for one, other in zip(here, there, strict=True):
        for key in one.keys() - {"tokens_per_second"}:
            assert other[key] == pytest.approx(one[key], abs=close, rel=close), (key, one["step"])
    assert len(losses(folder / name)) == recipe["run"]["steps"]
    first, second = (one["summary"] for one in said[name][:2])
    assert first == second, "all ranks return rank 0's summary"


def test_weights_are_gathered_and_gradients_reduced_once_a_step_whatever_the_passes(of_two):
    _, said = of_two
    few, many = (said[f"count_{count}"][0]["collectives"] for count in (1, 5))
    assert few == many
    units, steps, evaluations = 3, 2, 1  # two layers, and what is around them
    assert many["_allgather_base_"] == units * (steps + evaluations)
    # The first layer's parts of slots that do not change are computed apart, and reduced apart.
    assert many["_reduce_scatter_base_"] == (units + 1) * steps
    assert said["accumulate_step"][0]["collectives"]["_allgather_base_"] == units * (6 + evaluations)
    assert said["recompute_pass"][0]["collectives"]["_allgather_base_"] > 5 * units * 6


def test_what_does_not_fit_the_ranks_is_refused_before_anything_is_there(tmp_path):
    cases = {
        "replicas": (
            recipe_of(parallel={**STEP, "replicas": 3}),
            r"parallel\.replicas = 3: must divide the 2",
        ),
        "degree": (recipe_of(parallel={"kind": "tensor", "degree": 4}), r"parallel\.degree = 4: must divide"),
        "heads": (
            recipe_of(parallel={"kind": "tensor", "degree": 2}, backbone={"num_attention_heads": 1}),
            r"parallel\.degree = 2: must divide .* is 1",
        ),
        "batch": (
            recipe_of(run={"batch_tokens": 48}, parallel=STEP),
            r"run\.batch_tokens = 48: .* 3 sequences",
        ),
        "micro": (
            recipe_of(run={"micro_batch": 8}, parallel=STEP),
            r"run\.micro_batch = 8: must divide the 4",
        ),
        "single": (recipe_of(parallel={"kind": "single"}), "parallel.kind = 'single': is for one process, 2"),
        "memory": (
            recipe_of(parallel=STEP, backbone={"hidden_size": 4_000_000}),
            "too little memory: .* 2 ranks",
        ),
    }
    said = train_on(2, {name: recipe for name, (recipe, _) in cases.items()}, tmp_path)
    for name, (_, message) in cases.items():
        assert re.search(message, said[name][0]["message"]), said[name][0]
        assert said[name][1]["error"] in ("RecipeError", "Elsewhere"), said[name][1]
        assert not (tmp_path / name / "recipe.toml").exists()
