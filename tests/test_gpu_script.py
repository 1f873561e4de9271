"""benchmarks/gpu.py, as far as a machine without a GPU can try it."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import lattice
from lattice.decoder import Decoder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--device", "cpu", "--sizes", "tiny"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def lines(folder, part):
    return [json.loads(line) for line in (folder / f"gpu_{part}.jsonl").read_text().splitlines()]


def test_parity(script, tmp_path, monkeypatch):
    pytest.importorskip("torchao.float8")
    assert script.main(["parity", *TINY, "--out", str(tmp_path)]) == 0
    rows = lines(tmp_path, "parity")
    assert {row["case"] for row in rows} == {
        "golden",
        "flash",
        "recorded",
        "block mask",
        "compiled",
        "float8",
    }
    assert all(row["ok"] and row["versions"]["torch"] == torch.__version__ for row in rows)
    golden = [row for row in rows if row["case"] == "golden"]
    assert all(row["logits"] < 1e-5 for row in golden)
    assert {row["name"].split("/")[0] for row in golden} == {"gpt_neox", "llama"}


@pytest.mark.filterwarnings("ignore:.*multiplies the embeddings by:UserWarning")
def test_a_failed_case_is_a_line_and_the_exit_status(script, tmp_path, monkeypatch):
    parts = importlib.import_module("gpu_parity")
    for name in ("attention", "formats"):
        monkeypatch.setattr(parts, name, lambda options: ())
    monkeypatch.setattr(parts, "within", lambda found, limits, **values: 1 / 0)
    assert script.main(["parity", *TINY, "--out", str(tmp_path)]) == 1
    rows = lines(tmp_path, "parity")
    assert len(rows) > 1
    assert not any(row["ok"] for row in rows)
    assert {row["error"] for row in rows} == {"ZeroDivisionError: division by zero"}


def test_without_pytest_all_other_cases_are_tried(script, tmp_path, monkeypatch):
    parts = importlib.import_module("gpu_parity")
    monkeypatch.setattr(parts, "formats", lambda options: ())
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert script.main(["parity", *TINY, "--out", str(tmp_path)]) == 1
    golden, *others = lines(tmp_path, "parity")
    assert "pytest" in golden["error"]
    assert others
    assert all(row["ok"] for row in others)


@pytest.mark.filterwarnings("ignore:.*multiplies the embeddings by:UserWarning")
def test_a_loss_added_in_another_order_passes_and_another_loss_does_not(script, tmp_path):
    parts = importlib.import_module("gpu_parity")
    reader = parts.golden_reader()
    manifest, tensors = reader.load_case("gpt_neox/vanilla")
    source = reader.hf_folder(tmp_path, manifest["arch"], manifest["config"])
    model = lattice.from_pretrained(source, {"kind": "none"})
    found = {}
    parts._golden_case(found, model, {**manifest, "loss": manifest["loss"] * (1 + 2e-6)}, tensors)
    assert found["loss"] == pytest.approx(2e-6, abs=5e-7)
    model.zero_grad()
    with pytest.raises(AssertionError, match=r"^loss above the limit"):
        parts._golden_case(found, model, {**manifest, "loss": manifest["loss"] * (1 + 5e-5)}, tensors)
    assert found["loss"] == pytest.approx(5e-5, abs=5e-7)


def test_thoughts(script, tmp_path):
    asked = ["--thoughts", "0", "2", "--precisions", "fp32", "bf16", "--checkpointing", "none", "pass"]
    assert script.main(["thoughts", *TINY, *asked, "--out", str(tmp_path)]) == 0
    rows = lines(tmp_path, "thoughts")
    labels = {(row["thoughts"], row["precision"], row["checkpointing"]) for row in rows}
    assert len(labels) == len(rows) == 8
    for row in rows:
        assert row["ok"]
        assert row["tokens_per_second"] > 0
        assert row["mfu"] is None  # of a machine whose peak is not known


def labels_of(script, *arguments):
    """Of all cases of a call, by part, in order."""
    options = script.parsed(["--device", "cpu", *arguments])
    listed = [(part, labels) for part, cases in script.parts(options) for labels, _ in cases]
    return [one for one in listed if options.part in ("all", one[0])]


def test_the_most_important_cases_come_first_and_none_twice(script):
    cases = labels_of(script)
    assert [part for part, _ in cases[:5]] == ["goal"] * 4 + ["thoughts"]
    goal = {"size": "1.4b", "thoughts": 1, "checkpointing": "none", "length": 2048}
    ways = [(False, "bf16"), (False, "float8"), (True, "bf16"), (True, "float8")]
    assert [labels for _, labels in cases[:4]] == [
        {**goal, "precision": precision, "compiled": compiled} for compiled, precision in ways
    ]
    order = [(part, labels.get("size")) for part, labels in cases]
    sizes = ("1.4b", "410m", "160m")
    assert list(dict.fromkeys(order)) == [
        ("goal", "1.4b"),
        *((part, size) for size in sizes for part in ("thoughts", "decode")),
        ("parity", None),
        *(("kernels", size) for size in sizes),
    ]
    steps = [labels for part, labels in cases if part in ("goal", "thoughts")]
    assert all(labels not in steps[:at] for at, labels in enumerate(steps))
    compiled = [labels for _, labels in labels_of(script, "goal", "--compiled", "yes")]
    assert [labels["compiled"] for labels in compiled] == [True, True]
    alone = [labels for _, labels in labels_of(script, "thoughts", "--sizes", "1.4b")]
    assert len(alone) == 16
    assert all(labels in alone for labels in [labels for _, labels in cases[:2]])


@pytest.mark.parametrize("part", ["all", "thoughts", "decode", "parity", "kernels"])
def test_no_case_begins_after_the_time(script, part, tmp_path, capsys):
    assert script.main([part, *TINY, "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    left = len(labels_of(script, part, "--sizes", "tiny"))
    assert f"{left} cases left out after 0.0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "each", "second_fits", "rows"),
    [
        (18.8 + 17.1, 17.1, True, 3),  # 53 of 75 with two
        (60, 44, False, 1),
        (60, 20, True, 1),  # it has fitted into what is held back
        (20, 0, True, 8),
        (20, 5, True, 8),
        (20, 5.5, True, 8),
        (20, 10, True, 6),
    ],
)
def test_a_micro_batch_is_what_fits(script, first, each, second_fits, rows):
    speed = importlib.import_module("gpu_speed")
    tried = []

    def probe(count):
        tried.append(count)
        if count == 2 and not second_fits:
            raise torch.OutOfMemoryError("too large")
        return first + (count - 1) * each, 0.1 * count

    assert speed.rows_that_fit(probe, most=8, room=75, seconds=2) == rows
    assert tried == [1, 2]
    assert speed.rows_that_fit(probe, most=8, room=75, seconds=0.55) == min(rows, 5)
    assert speed.rows_that_fit(probe, most=8, room=75, seconds=0.01) == 1


def test_what_does_not_fit_at_all_is_an_error(script):
    speed = importlib.import_module("gpu_speed")

    def probe(count):
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        speed.rows_that_fit(probe, most=8, room=75, seconds=2)


def test_a_batch_that_does_not_fit_after_all_is_made_smaller(script, monkeypatch):
    speed = importlib.import_module("gpu_speed")
    tried = []

    def measured(step, rows, options):
        tried.append(rows)
        if rows > fits:
            raise torch.OutOfMemoryError("too large")
        return {}

    monkeypatch.setattr(speed, "ready", lambda labels, options: (None, options.micro_batch))
    monkeypatch.setattr(speed, "speed", measured)
    options = script.parsed(["thoughts", *TINY])
    options.micro_batch, fits, found = 8, 2, {}
    speed.measure(found, labels={}, options=options)
    assert tried == [8, 6, 4, 3, 2]
    assert found["micro_batch"] == 2
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        speed.measure(found, labels={}, options=options)
    assert tried[-1] == 1


def test_slow_steps_are_repeated_less_often(script):
    speed = importlib.import_module("gpu_speed")
    options = script.parsed(["goal", *TINY, "--case-seconds", "0"])
    options.repetitions = 10
    assert len(speed.repeated(lambda: None, options)) == 2
    options.case_seconds = 1e6
    assert len(speed.repeated(lambda: None, options)) == 10


def test_decode(script, tmp_path):
    asked = ["--thoughts", "1", "--batches", "2", "--out", str(tmp_path)]
    assert script.main(["decode", *TINY, *asked]) == 0
    rows = lines(tmp_path, "decode")
    assert [row["graphs"] for row in rows] == [True, False]
    assert all(row["ok"] and row["repetitions"] == 2 for row in rows)


def test_profile(script, tmp_path):
    asked = ["--precisions", "fp32", "--compiled", "no", "--profile", "--out", str(tmp_path)]
    assert script.main(["goal", *TINY, *asked]) == 0
    (row,) = lines(tmp_path, "goal")
    assert row["ok"]
    assert "aten::mm" in (tmp_path / row["table"]).read_text()
    with gzip.open(tmp_path / row["trace"]) as file:
        assert json.load(file)["traceEvents"]


def test_kernels(script, tmp_path):
    """A CPU has one kernel for attention and one scale in float8: all else are lines that say so."""
    assert script.main(["kernels", *TINY, "--out", str(tmp_path)]) == 0
    rows = lines(tmp_path, "kernels")
    assert {row["kernel"] for row in rows} == {"product", "attention"}
    computed = [row for row in rows if row.get("format") == "bf16" or row.get("backend") == "default"]
    assert len(computed) == 6
    for row in computed:
        assert row["ok"]
        assert row.get("tflops", row.get("backward_tflops")) > 0


def test_fewer_layers(script, tmp_path):
    asked = ["--precisions", "fp32", "--compiled", "no", "--layers", "3", "--out", str(tmp_path)]
    assert script.main(["goal", *TINY, *asked]) == 0
    assert [row["layers"] for row in lines(tmp_path, "goal")] == [3]
    cases = importlib.import_module("gpu_cases")
    recipe = cases.recipe_of("tiny", 1, device=torch.device("cpu"), layers=3)
    assert len(cases.build(recipe, torch.device("cpu")).decoder.blocks) == 3


def test_speed_does_not_wait_for_weights_drawn_on_the_cpu(script, monkeypatch, tmp_path):
    def never(decoder, scheme):
        raise AssertionError("drawn on the CPU")

    monkeypatch.setattr(Decoder, "initialize", never)
    asked = ["--thoughts", "0", "--precisions", "fp32", "--checkpointing", "none"]
    assert script.main(["thoughts", *TINY, *asked, "--out", str(tmp_path)]) == 0


def test_without_a_gpu(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main(["decode"])
    assert "--device cpu --sizes tiny" in capsys.readouterr().err
