"""Runs as a user starts them: interrupted, killed, resumed, damaged and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lattice
from lattice import run_folder
from lattice.prepare import prepare
from lattice.recipe import RecipeError

USER = '''
"""Components that only these tests need."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lattice.components.recurrence.none import NoRecurrence, OnePass
from lattice.protocols import Evaluator, Metrics, MetricWriter, Unrolled
from lattice.registry import register


@register("metrics", "test_signal")
@dataclass(frozen=True, kw_only=True)
class SignalAt(Metrics):
    """Sends this process a signal once the loss of a step is logged."""

    step: int = 0
    name: str = "SIGTERM"
    sleep: float = 0.0

    def build(self, folder, first_step):
        return SignalWriter(self)


class SignalWriter(MetricWriter):
    def __init__(self, options):
        self.options = options

    def log(self, step, values):
        time.sleep(self.options.sleep)
        if step == self.options.step and "loss" in values:
            os.kill(os.getpid(), getattr(signal, self.options.name))

    def close(self):
        pass


@register("evaluator", "test_logits")
@dataclass(frozen=True, kw_only=True)
class Logits(Evaluator):
    """Writes the live model's logits, one file a call."""

    folder: str
    every: int = 0

    @torch.no_grad()
    def evaluate(self, subject):
        folder = Path(self.folder)
        folder.mkdir(exist_ok=True)
        logits = subject.model(torch.arange(16)[None]).logits
        save_file({"logits": logits}, folder / f"{len(list(folder.iterdir()))}.safetensors")
        return {}


@register("recurrence", "test_not_finite")
@dataclass(frozen=True, kw_only=True)
class NotFinite(NoRecurrence):
    """The plain model, but for one step whose loss or gradient is no number."""

    step: int
    what: str = "loss"

    def build(self, shape):
        return NotFinitePass(self)


class NotFinitePass(OnePass):
    def __init__(self, options):
        self.options = options

    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        hidden = super().__call__(stack, ids_BL, draw=draw, cache=cache).hidden_BLD
        if draw is None or draw.step != self.options.step - 1:
            return Unrolled(hidden)
        if self.options.what == "loss":
            return Unrolled(hidden * float("nan"))
        hidden.register_hook(lambda gradient: gradient * float("inf"))
        return Unrolled(hidden)
'''

RECIPE = """
imports = ["user.py"]

[run]
seed = 3
steps = 12
batch_tokens = 128
sequence_tokens = 16
micro_batch = 4
device = "cpu"
log_every = 1

[backbone]
kind = "gpt_neox"
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 32
vocab_size = 257
max_position_embeddings = 64
rotary_pct = 0.5

[recurrence]
kind = "latent_thoughts"
thoughts = 1
jacobi = { train = [1, 3], eval = 2 }

[optimizer]
kind = "adamw"
lr = 1e-2

[data]
kind = "embedded"
megabytes = 0.5
validation_fraction = 0.3

[checkpoint]
kind = "dcp"
every = 4
keep = 3

[evaluators.validation]
kind = "perplexity"
every = 3
max_tokens = 64
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The recipe and the user's file, and a cache of their own; torch on one thread, as its subprocesses."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "user.py").write_text(USER)
    (folder / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture
def train(place, tmp_path):
    """Trains the tiny recipe with overrides, in `tmp_path/run` if not told otherwise."""

    def train_(*overrides, out=None):
        return lattice.train(place / "tiny.toml", overrides=list(overrides), out=out or tmp_path / "run")

    return train_


@pytest.fixture(scope="module")
def whole(place):
    """The rows of an uninterrupted run with these overrides."""
    runs = {}

    def whole_(*overrides):
        if overrides not in runs:
            folder = place / f"whole{len(runs)}"
            lattice.train(place / "tiny.toml", overrides=list(overrides), out=folder)
            runs[overrides] = rows(folder)
        return runs[overrides]

    return whole_


def rows(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def steps(folder):
    return [row["step"] for row in rows(folder) if "loss" in row]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def stop_at(step, name="SIGTERM"):
    return ("metrics.stop.kind=test_signal", f"metrics.stop.step={step}", f"metrics.stop.name={name}")


def start(place, out, *overrides, limit=None):
    """`lattice run` as another process; `limit` is the largest file it may write."""
    code = "import sys, lattice.cli; lattice.cli.main(sys.argv[1:])"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    arguments = ["run", str(place / "tiny.toml"), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *(["--set", *overrides] if overrides else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"},
    )


# ── interrupted and resumed ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "overrides",
    [
        ("precision.kind=fp32",),
        ("precision.kind=bf16",),
        ("precision.kind=bf16", "mask.kind=document", "activation_checkpoint.kind=pass", "run.micro_batch=2"),
        ("backbone.tie_word_embeddings=true", "checkpoint.asynchronous=false", "run.micro_batch=8"),
    ],
)
def test_a_run_interrupted_twice_computes_the_same_bits(overrides, whole, train, tmp_path, capsys):
    expected = whole(*overrides)
    assert len([row for row in expected if "loss" in row]) == 12
    assert {len(row["residuals"]) for row in expected if "loss" in row} == {1, 2, 3}, "counts are drawn"
    for step in (5, 8):  # between two checkpoints, and on one
        stopped = train(*overrides, *stop_at(step))
        assert stopped == {"stopped_at": step, "folder": str(tmp_path / "run")}
        assert f"SIGTERM: stopped after step {step} and saved" in capsys.readouterr().out
        assert not (tmp_path / "run" / "summary.json").exists()
    summary = train(*overrides)
    assert f"resuming '{tmp_path / 'run'}' after step 8" in capsys.readouterr().out
    assert rows(tmp_path / "run") == expected
    assert summary["last_loss"] == expected[-2]["loss"]
    assert summary["validation_loss"] == expected[-1]["validation/loss"]


def test_a_signal_during_the_last_step_finishes_the_run(train, whole, tmp_path):
    summary = train(*stop_at(12, "SIGINT"))
    assert summary["steps"] == 12
    assert (tmp_path / "run" / "summary.json").is_file()
    assert rows(tmp_path / "run") == whole()


def test_signal_handlers_are_put_back(train):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(*stop_at(2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigterm_from_outside_and_the_lock(place, train, whole, tmp_path):
    """As a cluster does it: the process saves and exits with 0; until then nobody else may train there."""
    process = start(place, tmp_path / "run", "metrics.slow.kind=test_signal", "metrics.slow.sleep=0.2")
    for line in process.stdout:
        if line.startswith("step 2/12"):
            break
    with pytest.raises(run_folder.RunExists, match=r"another process is training in '.*run'.*--out"):
        train()
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM: stopped after step" in out
    assert "Traceback" not in errors
    done = steps(tmp_path / "run")
    assert 2 <= len(done) < 12
    train()
    assert rows(tmp_path / "run") == whole()


def test_a_second_sigint_ends_at_once(place, tmp_path):
    process = start(place, tmp_path / "run", "metrics.slow.kind=test_signal", "metrics.slow.sleep=60")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals that are pending at once would be one
    assert process.poll() is None, "the first one waits for the end of the step"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("step", [1, 6, 9])
def test_kill_9_and_the_same_command_again(step, place, train, whole, tmp_path):
    process = start(place, tmp_path / "run", *stop_at(step, "SIGKILL"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert steps(tmp_path / "run") == list(range(1, step + 1))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # and a line that was cut short
    train()
    assert steps(tmp_path / "run") == list(range(1, 13))
    assert rows(tmp_path / "run") == whole()


def test_killed_between_the_last_checkpoint_and_the_summary(train, whole, tmp_path):
    first = train()
    (tmp_path / "run" / "summary.json").unlink()
    again = train()
    timed = {"seconds", "tokens_per_second", "peak_memory_mib"}
    assert {key: again[key] for key in again.keys() - timed} == {
        key: first[key] for key in first.keys() - timed
    }
    assert steps(tmp_path / "run") == list(range(1, 13))
    assert rows(tmp_path / "run") == whole()


def test_a_finished_run_is_left_as_it_is(train, tmp_path, capsys):
    first = train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train() == first
    assert "has taken all its 12 steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# ── the same directory, another recipe ────────────────────────────────────────────────────────────
@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused_and_the_difference_named(finished, train, tmp_path):
    train(*([] if finished else stop_at(2)))
    before = rows(tmp_path / "run")
    with pytest.raises(run_folder.RunExists) as caught:
        train("optimizer.lr=0.5", "recurrence.jacobi.eval=1", "recurrence.embed_scale=2.0")
    message = str(caught.value)
    assert "optimizer.lr: 0.01 there, 0.5 here" in message
    assert "recurrence.jacobi.eval: 2 there, 1 here" in message
    assert "recurrence.embed_scale: 'unset' there, 2.0 here" in message
    assert "--out" in message
    assert rows(tmp_path / "run") == before


def test_what_may_differ_does_not_make_another_run(train, whole, tmp_path):
    train(*stop_at(5))
    train(
        "run.log_every=5", "checkpoint.every=3", "evaluators.more.kind=perplexity", "evaluators.more.every=0"
    )
    found = [row for row in rows(tmp_path / "run") if not any(key.startswith("more/") for key in row)]
    assert found == whole()


@pytest.mark.parametrize(
    "override", ["run.micro_batch=1", "activation_checkpoint.kind=pass", "activation_checkpoint.kind=block"]
)
def test_a_run_may_go_on_on_a_machine_with_less_memory(train, whole, tmp_path, override):
    train(*stop_at(5))
    train(override)
    found = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert found == pytest.approx([row["loss"] for row in whole() if "loss" in row], abs=1e-6)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": "many"}'])
def test_a_summary_that_is_none_is_named(train, tmp_path, text):
    train("run.steps=3")
    (tmp_path / "run" / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json: no summary of a run"):
        train("run.steps=3")


def test_more_steps_go_on_from_the_end(train, tmp_path):
    first = train("schedule.kind=wsd")
    twelve = rows(tmp_path / "run")
    longer = train("schedule.kind=wsd", "run.steps=15")
    assert (first["steps"], longer["steps"]) == (12, 15)
    assert longer["tokens"] == 15 * 128
    assert rows(tmp_path / "run")[: len(twelve)] == twelve
    assert steps(tmp_path / "run") == list(range(1, 16))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == longer


def test_a_run_may_be_ended_where_it_was_stopped(train, tmp_path):
    train(*stop_at(5))
    summary = train("run.steps=5")
    assert summary["steps"] == 5
    assert "validation_loss" in summary
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" not in row] == [3, 5]


def test_fewer_steps_than_were_taken_are_no_result(train, tmp_path):
    """A summary of 3 steps after 5 were taken would be of another model."""
    train(*stop_at(5))
    with pytest.raises(ValueError, match=r"run\.steps = 3.*5"):
        train("run.steps=3")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


# ── what goes wrong on the way ────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run(what, train, tmp_path):
    with pytest.raises(ValueError, match="not finite") as caught:
        train("recurrence.kind=test_not_finite", "recurrence.step=7", f"recurrence.what={what}")
    message, run = str(caught.value), tmp_path / "run"
    assert message.startswith("step 7: loss ")
    assert f"The last good checkpoint is {run / 'checkpoints' / 'step-00000004'}" in message
    identity = message.split("The batch: ")[1].split(". The last")[0]
    assert "epoch" in identity
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    model = lattice.load(run / "checkpoints" / "step-00000004", trust_imports=True)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not (run / "summary.json").exists()
    with pytest.raises(ValueError, match="step 7") as again:
        train("recurrence.kind=test_not_finite", "recurrence.step=7", f"recurrence.what={what}")
    assert str(again.value) == message, "the same batch is named when the run is tried again"


def test_no_number_before_the_first_checkpoint(train):
    with pytest.raises(ValueError, match=r"^step 1: .*There is no checkpoint yet"):
        train("recurrence.kind=test_not_finite", "recurrence.step=1")


def damage(checkpoint):
    path = next(iter(sorted(checkpoint.glob("*.safetensors"))))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_latest_checkpoint_falls_back_to_the_one_before(train, whole, tmp_path):
    train(*stop_at(10))
    assert checkpoints(tmp_path / "run") == ["step-00000004", "step-00000008", "step-00000010"]
    damage(tmp_path / "run/checkpoints/step-00000010")
    with pytest.warns(
        UserWarning, match=r"step-00000010.*checksum differs; the checkpoint before it is tried"
    ):
        train()
    assert rows(tmp_path / "run") == whole()


def test_no_intact_checkpoint_is_an_error_and_not_a_new_start(train, tmp_path):
    train(*stop_at(5))
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        damage(checkpoint)
    with (
        pytest.warns(UserWarning, match="checksum differs"),
        pytest.raises(ValueError, match="none of the 2 checkpoints"),
    ):
        train()
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_checkpoint_of_another_model_is_refused(train, tmp_path):
    train("backbone.hidden_size=32", "run.steps=4", out=tmp_path / "wide")
    train(*stop_at(5))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "wide" / "checkpoints", tmp_path / "run" / "checkpoints")
    for call in (train, lambda: lattice.load(tmp_path / "run", trust_imports=True)):
        with pytest.raises(ValueError, match="32") as caught:
            call()
        assert "step-00000004" in str(caught.value)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_full_disk_leaves_the_last_good_checkpoint(place, train, whole, tmp_path):
    train(*stop_at(5))
    process = start(place, tmp_path / "run", limit=30_000)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2, out + errors
    assert "Traceback" not in errors
    assert "checkpoint of step 8 could not be saved" in errors
    assert "the last good one is step 5" in errors
    assert checkpoints(tmp_path / "run") == ["step-00000004", "step-00000005"]
    train()
    assert rows(tmp_path / "run") == whole()


def test_a_recipe_that_cannot_train_here_leaves_nothing_behind(train, tmp_path):
    for override, message in [
        ("backbone.max_position_embeddings=8", r"run\.sequence_tokens = 16.*max_position_embeddings = 8"),
        ("backbone.vocab_size=200", r"backbone\.vocab_size = 200.*257 tokens"),
        ("run.device=cuda:99", r"run\.device = 'cuda:99': not available"),
        ("backbone.hidden_size=4_000_000", "too little memory: needs at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(override)
        assert not (tmp_path / "run" / "recipe.toml").exists(), override
    train("run.steps=1")  # the directory is still free for a recipe that fits


# ── results ───────────────────────────────────────────────────────────────────────────────────────
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
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
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


def test_load_of_what_is_no_run(train, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' is no run and no checkpoint of one"):
        lattice.load(tmp_path / "nowhere")
    train("run.steps=1")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        lattice.load(tmp_path / "run", trust_imports=True)


@pytest.fixture(scope="module")
def short_documents(place):
    """Prepared documents that are shorter than a sequence, so that each sequence holds several."""
    text = "".join(json.dumps({"text": f"{n} {n * n}"}) + "\n" for n in range(1500))
    (place / "short.jsonl").write_text(text)
    out = place / "short"
    prepare([str(place / "short.jsonl")], out, "bytes", validation_fraction=0.1, show_progress=False)
    return ("data.kind=packed_tokens", f"data.path={out}", "run.steps=6")


def test_a_document_does_not_see_the_one_before_it(whole, short_documents):
    """The same weights and batches: the loss of the first step differs by the mask alone."""
    causal = whole(*short_documents)
    document = whole(*short_documents, "mask.kind=document")
    assert len(causal) == len(document)
    assert causal[0]["loss"] == pytest.approx(document[0]["loss"], abs=0.5)
    for key in ("loss", "validation/loss"):
        differing = [a[key] != b[key] for a, b in zip(causal, document, strict=True) if key in a]
        assert all(differing), key


def test_documents_come_back_after_an_interruption(whole, train, short_documents, tmp_path):
    overrides = (*short_documents, "mask.kind=document")
    train(*overrides, *stop_at(3))
    train(*overrides)
    assert rows(tmp_path / "run") == whole(*overrides)


def test_other_data_under_the_same_name_is_refused(place, train, short_documents, tmp_path):
    train(*short_documents, *stop_at(3))
    (place / "other.jsonl").write_text("".join(json.dumps({"text": f"{n} + {n}"}) + "\n" for n in range(900)))
    kept = (place / "short").rename(place / "kept")
    try:
        prepare(
            [str(place / "other.jsonl")],
            place / "short",
            "bytes",
            validation_fraction=0.1,
            show_progress=False,
        )
        with pytest.raises(ValueError, match=r"step-00000003 was made with other data.*--out"):
            train(*short_documents)
    finally:
        shutil.rmtree(place / "short")
        kept.rename(place / "short")
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_weights_and_order_depend_on_the_seed_alone(place, whole, tmp_path):
    lattice.train(place / "tiny.toml", overrides=["run.steps=2", "schedule.kind=wsd"], out=tmp_path / "a")
    lattice.train(place / "tiny.toml", overrides=["run.steps=2", "schedule.kind=wsd"], out=tmp_path / "b")
    lattice.train(
        place / "tiny.toml", overrides=["run.steps=2", "schedule.kind=wsd", "run.seed=4"], out=tmp_path / "c"
    )
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a")[0]["loss"] == whole()[0]["loss"]
    assert rows(tmp_path / "a")[0]["loss"] != rows(tmp_path / "c")[0]["loss"]


def test_accumulation_computes_the_gradient_of_the_whole_batch(whole):
    """Up to the order of the sums: a micro-batch is not a batch."""
    at_once, in_four = whole("run.micro_batch=8", "run.steps=3"), whole("run.micro_batch=2", "run.steps=3")
    for one, four in zip(at_once, in_four, strict=True):
        for key in ("loss", "grad_norm", "validation/loss"):
            assert one.get(key, 0) == pytest.approx(four.get(key, 0), rel=1e-4), key


def test_the_run_directory_says_what_it_ran(train, place, tmp_path):
    train("run.steps=1")
    text = (tmp_path / "run" / "recipe.toml").read_text()
    assert f"torch {torch.__version__}" in text
    assert "\n# commit " in text
    again = lattice.load_recipe(tmp_path / "run" / "recipe.toml")
    assert again.table() == lattice.load_recipe(place / "tiny.toml", ["run.steps=1"]).table()
    assert Path(again.imports[0]).name == "user.py"
