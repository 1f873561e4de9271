"""benchmarks/gpu.py, as far as a machine without a GPU can try it."""

import importlib
import json
from pathlib import Path

import pytest
import torch

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
    assert {row["case"] for row in rows} == {"golden", "flash", "block mask", "compiled", "float8"}
    assert all(row["ok"] and row["versions"]["torch"] == torch.__version__ for row in rows)
    golden = [row for row in rows if row["case"] == "golden"]
    assert all(row["logits"] < 1e-5 for row in golden)
    assert {row["name"].split("/")[0] for row in golden} == {"gpt_neox", "llama"}


@pytest.mark.filterwarnings("ignore:.*multiplies the embeddings by:UserWarning")
def test_a_failed_case_is_a_line_and_the_exit_status(script, tmp_path, monkeypatch):
    parts = importlib.import_module("gpu_parity")
    for name in ("attention", "formats"):
        monkeypatch.setattr(parts, name, lambda options, report: None)
    monkeypatch.setattr(parts, "within", lambda found, limits, **values: 1 / 0)
    assert script.main(["parity", *TINY, "--out", str(tmp_path)]) == 1
    rows = lines(tmp_path, "parity")
    assert len(rows) > 1
    assert not any(row["ok"] for row in rows)
    assert {row["error"] for row in rows} == {"ZeroDivisionError: division by zero"}


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


def test_a_batch_that_does_not_fit_is_halved(script, monkeypatch):
    speed = importlib.import_module("gpu_speed")
    tried = []

    def measure(recipe, device, *, length, micro_batch, options):
        tried.append(micro_batch)
        if micro_batch > fits:
            raise torch.OutOfMemoryError("too large")
        return {"micro_batch": micro_batch}

    monkeypatch.setattr(speed, "measure", measure)
    options = script.parsed(["thoughts", *TINY])
    options.micro_batch = 8
    case = {"size": "tiny", "thoughts": 1, "precision": "bf16", "checkpointing": "none", "compiled": False}
    fits = 2
    assert speed.fitted(case, options) == {"micro_batch": 2}
    assert tried == [8, 4, 2]
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        speed.fitted(case, options)


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
