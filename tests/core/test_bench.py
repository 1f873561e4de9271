"""What `lattice bench` says, on models so small that only the bookkeeping is tried."""

import json
import weakref
from collections import deque

import pytest
import torch
from matplotlib.figure import Figure

import lattice
from lattice import bench as benching
from lattice.bench import Case, Options, bench
from lattice.bench_report import _picture, run_bench, show
from lattice.cli import main
from lattice.generate import stream
from lattice.ledger import ledger
from lattice.live_tensors import LiveTensors
from lattice.testing.counted import operations
from lattice.thought_counts import with_thoughts

TINY = {
    "kind": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
COUNTED = {
    "latent_thoughts": "thoughts",
    "pause": "pauses",
    "loop": "loops",
    "ponder": "steps",
    "hidden_ponder": "steps",
}


def recipe_of(kind="latent_thoughts", **tables):
    run = {"batch_tokens": 32, "sequence_tokens": 16, "device": "cpu"}
    return lattice.load_recipe({"backbone": TINY, "recurrence": {"kind": kind}, "run": run, **tables})


@pytest.mark.parametrize("kind", list(COUNTED))
@pytest.mark.parametrize("count", [0, 1, 3])
def test_thought_counts(kind, count):
    recipe = with_thoughts(recipe_of(kind), count, drawn=False)
    assert getattr(recipe.component("recurrence"), COUNTED[kind]) == count
    costs = ledger(recipe)
    assert costs.training_token_passes == pytest.approx(costs.evaluation_token_passes)
    assert costs.inference_token_passes == count + 1
    assert recipe.component("backbone") == recipe_of().component("backbone")


def test_thought_counts_that_cannot_be():
    plain = recipe_of("none")
    assert with_thoughts(plain, 0).component("recurrence") == plain.component("recurrence")
    with pytest.raises(ValueError, match="thoughts = 2: recurrence 'none' has none"):
        with_thoughts(recipe_of("none"), 2)
    with pytest.raises(ValueError, match="thoughts = 0: recurrence 'depth'"):
        with_thoughts(recipe_of("depth"), 0)
    repeated = with_thoughts(recipe_of("depth"), 3).component("recurrence").repetitions
    assert (repeated.train, repeated.eval) == ((3, 3), 3)


@pytest.mark.parametrize("kind", ["none", "depth", *COUNTED])
@pytest.mark.parametrize("mode", ["train", "eval", "decode"])
def test_rows(kind, mode):
    recipe = recipe_of(kind, precision={"kind": "bf16"})
    options = Options(mode=mode, warm_up=1, repetitions=3, new_tokens=4, peak_tflops=1)
    (row,) = bench([Case(label="mine", thoughts=1, recipe=recipe)], options)
    rate, costs = row["tokens_per_second"], ledger(recipe, length=row["ledger"]["length"])
    assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    passes, operations = {
        "train": (costs.training_token_passes, costs.training_operations),
        "eval": (costs.evaluation_token_passes, costs.evaluation_operations),
        "decode": (costs.inference_token_passes, costs.inference_operations),
    }[mode]
    assert row["token_passes_per_second"] == pytest.approx(rate["median"] * passes)
    assert row["mfu"] == pytest.approx(rate["median"] * operations / 1e12)
    assert (row["batch"], row["length"]) == ((1, 32) if mode == "decode" else (2, 16))
    parts = {"train": {"data", "forward", "backward", "optimizer"}, "eval": {"data", "forward"}}
    assert set(row["seconds"]) == parts.get(mode, {"data", "prefill", "forward"})
    weights = 4 * costs.parameters
    assert row["peak_memory_mib"] * 2**20 > (4 if mode == "train" else 1) * weights
    assert row["peak_process_mib"] > row["peak_memory_mib"]
    json.dumps(row)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_mask_gets_the_documents_that_it_needs(mode):
    """Which attention then runs with pairs of slots: time and memory are those of training."""
    rows = {
        kind: next(bench([Case(label=kind, thoughts=1, recipe=recipe_of(mask={"kind": kind}))], options))
        for kind in ("causal", "document")
        for options in [Options(mode=mode, warm_up=0, repetitions=1, batch=4, length=64)]
    }
    pairs = 4 * 128 * 128  # of all rows, a byte each
    more = rows["document"]["peak_memory_mib"] - rows["causal"]["peak_memory_mib"]
    assert more * 2**20 > pairs


def test_operations_of_decoding_are_those_of_the_mean_token():
    """Counted, where attention to the tokens before is much of them."""
    recipe = recipe_of("none")
    options = Options(mode="decode", warm_up=0, repetitions=1, length=4, new_tokens=50)
    (row,) = bench([Case(label="mine", thoughts=0, recipe=recipe)], options)
    tokens = stream(lattice.build_model(recipe).eval(), torch.zeros(1, 4, dtype=torch.int64), 51)
    next(tokens)  # from the prompt
    counted = operations(lambda: deque(tokens, maxlen=0)) / 50
    assert row["operations_per_token"] == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("reserved", [0, 1, 39])
def test_all_ids_but_reserved_ones_are_drawn(reserved):
    recipe = recipe_of(recurrence={"kind": "pause", "pause_token_id": reserved})
    workload = benching.Workload(Case(label="mine", thoughts=1, recipe=recipe), Options(batch=64, length=64))
    assert set(workload.batch.ids_BL.unique().tolist()) == set(range(40)) - {reserved}


def test_memory_on_a_gpu_is_without_that_of_the_other_cases(monkeypatch):
    """The counters of a GPU, as they would stand beside cases that hold 5 GiB."""
    workload = benching.Workload(Case(label="mine", thoughts=1, recipe=recipe_of()), Options())
    workload.once()
    mine = 4 * 3 * sum(parameter.numel() for parameter in workload.model.parameters())  # and two moments
    monkeypatch.setattr(workload, "device", torch.device("cuda"))
    monkeypatch.setattr(workload, "_call", lambda clock: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * 2**30 + mine)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30 + mine + 2**20)
    assert workload._peaks()["peak_memory_mib"] == pytest.approx(mine / 2**20 + 1, rel=0.01)


@pytest.mark.parametrize("thoughts", [[2, 0], None])
def test_recipes_take_turns(thoughts, monkeypatch):
    """Those of one count, or all as they are, whatever counts they have."""
    turns, once = [], benching.Workload.once

    def watched(self):
        turns.append((self.case.label, self.case.thoughts))
        once(self)

    monkeypatch.setattr(benching.Workload, "once", watched)
    recipes = {"a": recipe_of("loop"), "b": with_thoughts(recipe_of("pause"), 3)}
    rows = run_bench(recipes, thoughts, Options(mode="eval", warm_up=1, repetitions=2), None)
    groups = [[("a", 1), ("b", 3)]] if thoughts is None else [[("a", 0), ("b", 0)], [("a", 2), ("b", 2)]]
    assert turns == [case for group in groups for case in 3 * group]
    assert [(row["recipe"], row["thoughts"]) for row in rows] == [case for group in groups for case in group]


def test_a_recipe_as_it_is_has_its_own_count():
    recipes = {kind: recipe_of(recurrence={"kind": kind, option: 2}) for kind, option in COUNTED.items()}
    recipes["none"], recipes["depth"] = recipe_of("none"), recipe_of("depth")
    counts = {**dict.fromkeys(COUNTED, 2), "none": 0, "depth": 4}  # depth draws, but not at evaluation
    rows = run_bench(recipes, None, Options(mode="train", warm_up=0, repetitions=1), None)
    assert {row["recipe"]: row["thoughts"] for row in rows} == counts
    costs = {row["recipe"]: row["ledger"] for row in rows}
    assert costs["depth"]["training_token_passes"] == costs["depth"]["evaluation_token_passes"]


@pytest.mark.parametrize("where", ["_ready", "_train"])
def test_a_case_that_does_not_fit_is_a_row_and_the_others_go_on(where, monkeypatch):
    does = getattr(benching.Workload, where)

    def fails(self, *arguments):
        result = does(self, *arguments)
        if self.case.label == "b":
            held.append(weakref.ref(self.model))
            raise torch.OutOfMemoryError("no room\nat all")
        assert not any(model() for model in held), "what does not fit is let go"
        return result

    held = []
    monkeypatch.setattr(benching.Workload, where, fails)
    cases = [Case(label=label, thoughts=1, recipe=recipe_of()) for label in "abc"]
    rows = list(bench(cases, Options(warm_up=0, repetitions=1)))
    assert [row.get("error") for row in rows] == [None, "no room", None]


def test_no_marker_is_cut_by_the_frame(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    about = {"recipe": "a", "mode": "decode", "batch": 1, "length": 32, "hardware": "here"}
    rates = dict.fromkeys(("low", "median", "high"), 70.0)
    rows = [
        {**about, "thoughts": count, "tokens_per_second": rates, "peak_memory_mib": 90.0 + count / 10}
        for count in range(3)
    ]
    _picture(rows, tmp_path / "bench.png")
    for axes, highest in zip(figures[0].axes, (70.0, 90.2), strict=True):
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 1.04 * highest


@pytest.mark.parametrize(
    "parts", [["data", "forward", "backward", "optimizer"], ["data", "prefill", "forward"]]
)
def test_tables_on_80_columns_break_no_word(parts, broken_words):
    row = {"mode": "train", "batch": 8, "length": 1024, "precision": "bf16", "hardware": "here"}
    row |= {"versions": {"torch": "2.13.0"}, "repetitions": 7, "thoughts": 3}
    row |= {"tokens_per_second": dict.fromkeys(("low", "median", "high"), 12345.0)}
    row |= {"token_passes_per_second": 98765.0, "peak_memory_mib": 10245.0, "peak_process_mib": 13171.0}
    row |= {"operations_per_token": 84_370e6, "operations_per_second": 5.3e14, "mfu": 0.536}
    row |= {"seconds": dict.fromkeys(parts, 12.3456)}
    show([{**row, "recipe": name} for name in ("pythia_70m_lt", "pythia_70m_hidden_ponder")])
    assert not broken_words()


def succeeds(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0


def test_command(tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(recipe_of().to_toml())
    plain = tmp_path / "plain.toml"
    plain.write_text(recipe_of("none").to_toml())
    common = ["bench", str(recipe), "--repetitions", "1", "--warm-up", "0", "--out", str(tmp_path / "out")]
    succeeds([*common, "--thoughts", "0", "2", "--compare", str(plain), "--solver", "gauss_seidel"])
    shown = capsys.readouterr().out
    assert "plain is left out: thoughts = 2" in shown
    assert "passes/s" in shown
    succeeds([*common, "--jacobi", "7", "--mode", "eval", "--batch", "3", "--length", "5"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "bench.jsonl").read_text().splitlines()]
    labels = [(row["recipe"], row["thoughts"]) for row in rows]
    assert labels == [("mine", 0), ("plain", 0), ("mine", 2), ("mine", 1)]
    assert rows[2]["ledger"]["training_token_passes"] == 3 * (3 + 1)  # sweeps
    assert rows[3]["ledger"]["evaluation_token_passes"] == 1 + 2 * 8
    assert (rows[3]["batch"], rows[3]["length"]) == (3, 5)
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thoughts", "-1"], "thoughts = -1: must be at least 0"),
        (["--repetitions", "0"], "repetitions = 0: must be at least 1"),
        (["--batch", "0"], "batch = 0: must be at least 1"),
        (["--peak-tflops", "0"], "peak_tflops = 0.0: must be greater than 0"),
        (["--jacobi", "7", "--solver", "gauss_seidel"], "--jacobi 7: the solver in use is gauss_seidel"),
        (["--mode", "training"], "--mode"),
        (["--solver", "newton"], "recurrence.solver"),
        (["--length", "65"], "context"),
        (["--mode", "decode", "--new-tokens", "1000"], "new_tokens = 1000: with a prompt of length = 32"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(recipe_of().to_toml())
    with pytest.raises(SystemExit) as caught:
        main(["bench", str(recipe), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# ── live tensors ──────────────────────────────────────────────────────────────────────────────────
def test_live_tensors():
    weight = torch.ones(1000)
    live = LiveTensors([weight], lambda tensor: "large" if tensor.numel() > 5000 else "small")
    with live:
        doubled = weight * 2
        view = doubled[:10]
        large = torch.zeros(10_000)
        assert live.live == 4 * (2000 + 10_000)
        del doubled
        assert live.live == 4 * (2000 + 10_000)  # the view holds it
        del large, view
        assert live.live == 4 * 1000
    assert live.peak == 4 * 12_000
    assert live.at_peak() == {"small": 8000, "large": 40_000}
    live.rename([weight], "weight")
    assert live.at_peak() == {"small": 4000, "large": 40_000, "weight": 4000}
