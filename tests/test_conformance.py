"""The conformance kit: built-in kinds pass, every broken variant is caught by the check meant for it."""

import re
from pathlib import Path

import pytest

import lattice
from lattice import cli, registry, scaffold
from lattice.testing import BACKBONES, assert_conforms, check_recurrence
from lattice.testing.subject import VOCABULARY, shown
from lattice.thought_counts import with_iterations
from tests.built_in import built_in

TABLES = [
    {"kind": "none"},
    {"kind": "pause", "pauses": 2, "pause_token_id": 3},
    {"kind": "loop", "loops": 2},
    {"kind": "ponder", "steps": 2, "top_k": 4},
    {"kind": "ponder", "steps": 1, "accumulate": False},
    {"kind": "hidden_ponder", "steps": 2},
    {"kind": "depth", "prelude": 0, "coda": 2, "normalize": False},
    {"kind": "depth", "inject": "concat", "repetitions": {"train": [1, 3], "eval": 2}, "grad_passes": 1},
    {"kind": "depth", "tolerance": 1e-3, "repetitions": {"train": [2, 3], "eval": 12}},
    {"kind": "latent_thoughts", "thoughts": 0},
    {"kind": "latent_thoughts", "thoughts": 2},
    {"kind": "latent_thoughts", "thoughts": 1, "feedback": "softmax", "top_k": 4, "grad_passes": 2},
    {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel", "position_ids": "fresh"},
    {"kind": "latent_thoughts", "thoughts": 1, "tolerance": 1e-4, "jacobi": {"eval": 12}},
    {"kind": "latent_thoughts", "thoughts": 2, "tolerance": 0.1, "solver": "gauss_seidel"},
]
BROKEN = {
    "future_leak": "causality",
    "wrong_positions": "batch and padding",
    "wrong_stages": "parallel and sequential",
    "stale_cache": "cached decoding",
    "undeclared_pass": "cost",
    "global_random": "determinism",
    "idle_parameter": "gradients",
    "carried_state": "documents",
    "hidden_weight": "save and load",
    "wrong_shape": "shapes",
    "unsaid_stop": "branches",
    "stop_at_once": "parallel and sequential",
    "tolerated_leak": "causality",
    "drawn_future_leak": "causality",
    "drawn_rows_mixed": "batch and padding",
    "drawn_carried_state": "documents",
    "chunk_leak": "causality",
    "late_leak": "causality",
    "late_carried_state": "documents",
    "token_leak": "causality",
    "token_carried_state": "documents",
    "wrong_sweeps": "parallel and sequential",
    "unsaid_sweeps": "parallel and sequential",
    "no_gradients": "cost",
    "undeclared_step": "cost",
    "undeclared_product": "cost",
    "logged_matrix": "shapes",
    "penalty_leak": "causality",
    "penalty_rows_mixed": "batch and padding",
    "penalty_random": "determinism",
    "supervision_leak": "causality",
    "deaf_to_count": "thoughts",
    "counts_on": "thoughts",
    "counts_backwards": "thoughts",
}
CARRIED = ("carried_state", "token_carried_state")
"""Between branches, too."""
ALONE = (
    "undeclared_pass",
    "idle_parameter",
    "hidden_weight",
    "stop_at_once",
    "no_gradients",
    "undeclared_step",
    "undeclared_product",
    "deaf_to_count",
    "counts_on",
    "counts_backwards",
)
"""Of the broken ones those with which nothing else is wrong."""
registry.import_user_code("broken_variants.py", Path(__file__).parent)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: "-".join(map(str, table.values())))
def test_built_in_kinds_conform(table, backbone):
    assert_conforms(table, backbone=backbone)


def test_every_built_in_kind_is_here():
    assert {table["kind"] for table in TABLES} == built_in("recurrence")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_variants_are_caught(kind):
    expected = {BROKEN[kind]} | ({"branches"} if kind in CARRIED else set())
    results = check_recurrence({"kind": kind}, checks=None if kind in ALONE else sorted(expected))
    failed = {result.check: result for result in results if not result.held}
    assert set(failed) == expected
    raises = failed[BROKEN[kind]].counterexample.startswith("raises")
    assert raises == (kind in ("unsaid_sweeps", "logged_matrix", "wrong_shape"))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_leak_at_any_token_is_caught(ahead):
    for token in range(VOCABULARY):
        leak = {"kind": "token_leak", "token": token, "ahead": ahead}
        (result,) = check_recurrence(leak, checks=["causality"], backbones=["llama"])
        assert "in training step" in (result.counterexample or "holds"), token


def test_the_same_without_the_mistake_conforms():
    assert_conforms({"kind": "right"})
    assert_conforms({"kind": "token_gate"})
    assert_conforms({"kind": "loop"})
    assert_conforms({"kind": "sweeps"}, check="parallel and sequential")
    assert_conforms({"kind": "sweeps"}, check="cost")


def test_what_float32_rounds_is_said_to_be_that():
    for gap in (4e-8, 3e-7):
        assert "promote_types" in shown(gap)
    assert [shown(gap) for gap in (1e-9, 1e-3, float("inf"))] == ["1.0e-09", "1.0e-03", "inf"]


def test_operations_of_its_own_that_are_drawn_count_in_the_mean():
    assert_conforms({"kind": "drawn_product"}, check="cost")
    for declared in (0, 1):
        wrong = {"kind": "drawn_product", "declared": float(declared)}
        (result,) = check_recurrence(wrong, checks=["cost"], backbones=["llama"])
        assert "operations a token in the mean of 48 draws" in (result.counterexample or "holds")


def test_a_recurrence_says_what_its_iterations_are():
    tables = {"backbone": BACKBONES["llama"], "recurrence": {"kind": "sweeps"}}
    recipe = with_iterations(lattice.load_recipe(tables), 5)
    assert recipe.component("recurrence").sweeps == 5
    with pytest.raises(
        ValueError, match=r"iterations = 5: recurrence 'loop' does not iterate: it has no method"
    ):
        with_iterations(lattice.load_recipe({**tables, "recurrence": {"kind": "loop"}}), 5)


def test_what_is_missing_is_said():
    (result,) = check_recurrence(
        {"kind": "unsaid_sweeps"}, checks=["parallel and sequential"], backbones=["llama"]
    )
    assert "recurrence 'unsaid_sweeps' does not iterate" in result.counterexample
    assert "it has no method `with_iterations(count)`" in result.counterexample
    (result,) = check_recurrence({"kind": "uncached"}, checks=["cost"], backbones=["llama"])
    assert result.counterexample == "the cache that stack.run is given takes 0 slots a token, declared are 1"
    (result,) = check_recurrence({"kind": "read_one"}, checks=["shapes"], backbones=["llama"])
    said, _, place = result.counterexample.partition(" (")
    assert said == "raises TypeError: read = -1: must be a slice of the stages, such as slice(-1, None)"
    assert re.search(r"broken_variants\.py:\d+, in forward\)$", place)
    (result,) = check_recurrence({"kind": "logged_matrix"}, checks=["shapes"], backbones=["llama"])
    assert "recurrence 'logged_matrix': telemetry 'gate' is a Tensor of shape (2, 2)" in result.counterexample


def test_the_counterexample_is_the_smallest():
    (result,) = check_recurrence({"kind": "future_leak"}, checks=["causality"], backbones=["llama"])
    said = r"L=2: changing token 1 from id \d+ to \d+ changes the logits of token 0 by "
    assert re.match(said, result.counterexample)
    (result,) = check_recurrence({"kind": "stale_cache"}, checks=["cached decoding"], backbones=["gpt_neox"])
    assert result.counterexample.startswith("B=1, prompt of 1, 1 more: logits differ by ")
    (result,) = check_recurrence({"kind": "undeclared_pass"}, checks=["cost"], backbones=["llama"])
    assert "training takes 3 token-passes" in result.counterexample
    assert "declared are 2" in result.counterexample


def test_what_is_claimed_is_a_line_of_the_table():
    (result,) = check_recurrence({"kind": "none"}, checks=["documents"], backbones=["llama"])
    assert result.claim.startswith("Under the document mask a packed document gets what it gets alone")
    assert "  " not in result.claim
    assert "\n" not in result.claim


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match="check = 'speed': must be one of shapes, causality"):
        check_recurrence({"kind": "none"}, checks=["speed"])
    with pytest.raises(ValueError, match="backbone = 'mamba': must be one of"):
        check_recurrence({"kind": "none"}, backbones=["mamba"])
    with pytest.raises(lattice.RecipeError, match="loops = -1"):
        check_recurrence({"kind": "loop", "loops": -1})
    with pytest.raises(AssertionError, match=r"causality \(llama\): L=2"):
        assert_conforms({"kind": "future_leak"}, backbone="llama")


def run(capsys, *arguments):
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "check", "loop", "--set", "loops=2")
    assert code == 0
    assert "all checks hold" in out
    Path("leak.py").write_text(
        (Path(__file__).parent / "broken_variants.py")
        .read_text()
        .split('@kind("wrong_positions")')[0]
        .replace('"future_leak"', '"leak_of_mine"')
        .replace('kind("right")(Again)', "")
    )
    code, out, _ = run(capsys, "check", "leak.py")
    assert code == 1
    assert "leak_of_mine" in out
    assert "checks fail: " in out
    assert "causality" in out
    for target, message in [
        ("lop", "did you mean 'loop'?"),
        ("gone.py", "gone.py does not exist"),
        ("mine.toml", "must be a .py file that registers components, or a kind of recurrence or backbone"),
        ("empty.py", "registers nothing that is checked (recurrence, backbone, mask)"),
    ]:
        Path("empty.py").write_text("")
        code, _, err = run(capsys, "check", target)
        assert code == 2
        assert message in err


def test_new_writes_what_conforms_and_trains(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "new", "recurrence", "fresh_idea")
    assert code == 0
    assert "lattice check fresh_idea.py" in out
    assert len(Path("fresh_idea.py").read_text().splitlines()) < 45
    code, out, _ = run(capsys, "check", "fresh_idea.py")
    assert (code, "all checks hold" in out) == (0, True)
    summary = lattice.train(
        "fresh_idea.toml",
        overrides=[
            "run.steps=2",
            "run.batch_tokens=128",
            "backbone.hidden_size=16",
            "backbone.vocab_size=300",
            "tokenizer.vocab_size=300",
            "data.megabytes=0.05",
            "evaluators.validation.max_tokens=128",
        ],
    )
    assert summary["steps"] == 2
    for arguments, message in [
        (("recurrence", "fresh_idea"), "fresh_idea"),
        (("recurrence", "other"), None),
        (("recurrence", "loop"), "exists already"),
        (("recurrence", "3x"), "must be a Python identifier"),
        (("recurrence", "class"), "must be a Python identifier"),
        (("mask", "mine"), "must be one of recurrence"),
    ]:
        code, _, err = run(capsys, "new", *arguments)
        assert code == (2 if message else 0)
        assert (message or "") in err


@pytest.mark.parametrize("name", ["unroll", "unrolled", "pass_", "recurrence", "dataclass", "true", "_1"])
def test_new_writes_what_works_under_any_name(tmp_path, name):
    """Though the class of that name would be one that the file imports, or none."""
    code, _ = scaffold.write("recurrence", name, tmp_path)
    registry.import_user_code(code.name, tmp_path)
    assert_conforms({"kind": name}, check="cost", backbone="llama")


@pytest.mark.parametrize("name", ["torch", "lattice", "dataclasses"])
def test_new_hides_no_module(tmp_path, name):
    with pytest.raises(ValueError, match=f"name '{name}': {name}.py would hide the module"):
        scaffold.write("recurrence", name, tmp_path)
    assert not list(tmp_path.iterdir())
