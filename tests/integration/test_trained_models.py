"""What a run leaves: a summary, a model that has learnt, and the way back to it."""

import json
import shutil
import statistics

import pytest
import torch

import lattice
from lattice.components.checkpoint.dcp import DcpCheckpointer
from lattice.load import load_subject
from lattice.recipe import RecipeError
from lattice.run_folder import training_steps
from tests.integration.training_runs import rows


def test_the_summary_and_that_the_model_learns(place, tmp_path):
    recipe = {
        "run": {"steps": 60, "batch_tokens": 512, "sequence_tokens": 32, "device": "cpu"},
        "backbone": {
            "kind": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 257,
            "max_position_embeddings": 64,
        },
        "recurrence": {"kind": "latent_thoughts", "jacobi": {"train": [1, 1], "eval": 1}},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "data": {"kind": "embedded", "megabytes": 0.5, "validation_fraction": 0.3},
        "evaluators": {
            "validation": {"kind": "perplexity", "every": 0, "max_tokens": 1024},
            "text": {"kind": "sample", "prompt": "def ", "max_new_tokens": 8},
        },
    }
    summary = lattice.train(recipe, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert (summary["first_loss"], summary["last_loss"]) == (losses[0], losses[-1])
    assert losses[0] == pytest.approx(5.55, abs=0.5), "about log 257 before anything is learnt"
    assert summary["last_loss"] < 3.6, "better than byte frequencies alone"
    assert summary["validation_loss"] < 4
    bits = summary["validation_loss"] / 0.6931471805599453
    assert summary["validation_bits_per_byte"] == pytest.approx(bits, rel=0.01), "a token is about a byte"
    assert summary["tokens"] == 60 * 512
    assert summary["seconds"] > 0
    rates = [row["tokens_per_second"] for row in training_steps(tmp_path / "run")]
    assert summary["tokens_per_second"] == statistics.median(rates)
    assert 50 < summary["peak_memory_mib"] < 8000
    assert summary["text_text"].startswith("def ")


@pytest.mark.parametrize("tied", ["true", "false"])
def test_load_gives_the_trained_model_back(tied, train, tmp_path):
    from safetensors.torch import load_file

    train(
        f"backbone.tie_word_embeddings={tied}",
        "evaluators.live.kind=test_logits",
        "evaluators.live.every=4",
        f"evaluators.live.folder={tmp_path / 'live'}",
    )
    run = tmp_path / "run"
    live = [load_file(tmp_path / "live" / f"{n}.safetensors")["logits"] for n in range(3)]
    assert not torch.equal(live[0], live[1])
    places = [run / "checkpoints" / f"step-{step:08d}" for step in (4, 8, 12)]
    for expected, path in zip([*live, live[2]], [*places, run], strict=True):
        model = lattice.load(path, trust_imports=True)
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(torch.arange(16)[None]).logits, expected), path
        same = model.decoder.head.weight is model.decoder.embedding.weight
        assert same == (tied == "true")
    assert lattice.codec_of(run, trust_imports=True).decode([104, 105]) == "hi"


def test_load_runs_no_code_of_a_run_unless_it_is_trusted(train, tmp_path):
    train("run.steps=1")
    for call in (lattice.load, lattice.codec_of):
        with pytest.raises(RecipeError, match=r"imports code .*user\.py.*trust_imports"):
            call(tmp_path / "run")
    assert lattice.load(tmp_path / "run", trust_imports=True).shape.hidden_size == 16


def test_the_users_code_of_a_run_is_kept_as_it_was(place, tmp_path, capfd):
    """A run is loaded where its file has gone, and a file that was changed since is named."""
    shutil.copytree(place, tmp_path / "mine", ignore=shutil.ignore_patterns("whole*", "cache"))
    recipe, code, run = tmp_path / "mine/tiny.toml", tmp_path / "mine/user.py", tmp_path / "run"
    began = code.read_bytes()
    lattice.train(recipe, overrides=["run.steps=1"], out=run)
    assert (run / "imports/user.py").read_bytes() == began
    assert "warning" not in capfd.readouterr().err
    code.write_bytes(began + b"\n# another thought\n")
    lattice.train(recipe, overrides=["run.steps=2"], out=run)
    assert f"'{code}' is not what the run began with" in capfd.readouterr().err
    assert (run / "imports/user.py").read_bytes() == began
    code.unlink()
    assert lattice.load(run, trust_imports=True).shape.hidden_size == 16
    assert f"'{code}' does not exist; in its place" in capfd.readouterr().err


def test_a_checkpoint_by_a_link_and_from_where_it_lies(train, tmp_path, monkeypatch):
    train("run.steps=2")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    (tmp_path / "best").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    for path in (tmp_path / "best", ".", "../step-00000002"):
        assert lattice.load(path, trust_imports=True).training is False


def test_a_checkpoint_that_is_removed_while_it_is_read(train, tmp_path, monkeypatch):
    """The run goes on: the latest is read in its place, and one that was named is said to be gone."""
    train("run.steps=3", "checkpoint.every=1")
    right, folder = DcpCheckpointer.load, tmp_path / "run" / "checkpoints"

    def removed(self, path, tensors):
        if path.name != "step-00000001":
            shutil.rmtree(path, ignore_errors=True)
        return right(self, path, tensors)

    monkeypatch.setattr(DcpCheckpointer, "load", removed)
    with pytest.raises(FileNotFoundError, match="step-00000003' was removed while it was read"):
        lattice.load(folder / "step-00000003", trust_imports=True)
    assert load_subject(tmp_path / "run", trust_imports=True).step == 1


def test_load_of_what_is_no_run(train, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' is no run and no checkpoint of one"):
        lattice.load(tmp_path / "nowhere")
    train("run.steps=1")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        lattice.load(tmp_path / "run", trust_imports=True)


def test_gradients_are_clipped_unless_the_recipe_says_0(train, tmp_path):
    found = {}
    for limit in ("0", "1e9", "1e-9"):
        train("run.steps=2", f"optimizer.grad_clip={limit}", out=tmp_path / limit)
        found[limit] = [row["loss"] for row in rows(tmp_path / limit) if "loss" in row]
    assert found["0"] == found["1e9"] != found["1e-9"]
