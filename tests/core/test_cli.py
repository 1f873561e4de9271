"""The command line: what it prints, its exit codes, and that an error of the user's is never a traceback."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import tomli
import torch
from rich.console import Console

import lattice
from lattice import cli, console, registry
from lattice.components_report import options_of
from lattice.protocols import ROLES
from lattice.report import show_summary
from lattice.run_options import RunOptions
from tests.built_in import built_in

pytestmark = pytest.mark.usefixtures("own_cache")
RECIPE = """
[run]
steps = 8
batch_tokens = 128
sequence_tokens = 16
device = "cpu"
log_every = 3

[backbone]
kind = "gpt_neox"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 32
vocab_size = 257
max_position_embeddings = 64
rotary_pct = 0.5

[optimizer]
kind = "adamw"
lr = 3e-2

[data]
kind = "embedded"
megabytes = 0.5
validation_fraction = 0.3

[evaluators.validation]
kind = "perplexity"
every = 4
max_tokens = 64
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's directory."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(RECIPE)
    lattice.train(folder / "tiny.toml", overrides=["recurrence.kind=latent_thoughts"], out=folder / "run")
    return folder / "run"


@pytest.fixture
def call(capsys):
    """Exit code, stdout and stderr of a command."""

    def call_(*arguments):
        capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "\x1b" not in out + err, "no colours and no cursor movements where there is no terminal"
        return code, out, err

    return call_


# ── show ──────────────────────────────────────────────────────────────────────────────────────────
def test_show_prints_a_recipe_that_says_the_same(call, tmp_path):
    sample = '[evaluators.text]\nkind = "sample"\nprompt = "[red]x[/] ' + "long " * 40 + '"\n'
    (tmp_path / "tiny.toml").write_text(RECIPE + sample)
    code, out, _ = call("show", "tiny.toml")
    assert code == 0
    assert tomli.loads(out) == lattice.load_recipe("tiny.toml").table()
    (tmp_path / "again.toml").write_text(out)
    assert lattice.load_recipe("again.toml").table() == lattice.load_recipe("tiny.toml").table()


def test_show_origin_says_where_each_value_comes_from(call):
    code, out, _ = call("show", "tiny.toml", "--origin", "--set", "run.seed=5")
    assert code == 0
    origins = {line.split(" = ")[0]: line.split("  # ")[-1].strip() for line in out.splitlines()}
    line = RECIPE.splitlines().index("hidden_size = 16") + 1
    assert origins["backbone.hidden_size"] == f"tiny.toml:{line}"
    assert origins["run.seed"] == "--set"
    assert origins["mask.kind"].startswith("lattice/defaults.toml:")
    assert origins["backbone.layer_norm_eps"].startswith("default")
    values = {one.split("  # ")[0].strip() for one in out.splitlines()}
    assert "run.seed = 5" in values
    assert "optimizer.betas = [0.9, 0.95]" in values


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", "run.seed=5", "run.steps=7", "optimizer.betas=[0.5, 0.6]"),
        ("--set", "run.seed=5", "--set", "run.steps=7", "--set", "optimizer.betas=[0.5, 0.6]"),
        ("--set=run.seed=5", "--set", "run.steps=7", "optimizer.betas = [0.5, 0.6]"),
    ],
)
def test_set_takes_one_or_several_values(arguments, call):
    code, out, err = call("show", "tiny.toml", *arguments)
    assert code == 0, err
    table = tomli.loads(out)
    assert (table["run"]["seed"], table["run"]["steps"]) == (5, 7)
    assert table["optimizer"]["betas"] == [0.5, 0.6]


def test_set_before_the_recipe_needs_nothing_special(call):
    code, out, err = call("show", "--set", "run.seed=5", "--origin", "--", "tiny.toml")
    assert code == 0, err
    assert "run.seed = 5" in out


# ── components ────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(console.console, "width", 200)


def test_components_of_a_role_with_their_options(call, wide):
    code, out, _ = call("components", "recurrence")
    assert code == 0
    for text in (
        "recurrence",
        "none",
        "latent_thoughts",
        "thoughts",
        "initializer_range",
        "PonderLM",
    ):
        assert text in out
    assert "perplexity" not in out


def test_a_description_of_two_lines_is_shown_to_its_end(call, wide):
    _, out, _ = call("components", "activation_checkpoint")
    assert "cheap." in out


@pytest.mark.parametrize("role", [*ROLES, "run"])
def test_the_options_of_a_role_are_explained(call, wide, role):
    """By the docstrings below them, those of nested tables and those that are inherited too."""
    code, out, err = call("components", role)
    assert code == 0, err
    expected = {
        "recurrence": ("jacobi.train", "[2, 4]", "Refinements of the solver", "one count is drawn"),
        "optimizer": ("grad_clip", "Largest global gradient norm; 0 for no clipping."),
        "parallel": ("degree", "required", "How many."),
        "run": ("micro_batch", "not set", "Gradients accumulate to batch_tokens."),
    }
    for text in expected.get(role, ()):
        assert text in out
    if role == "backbone":  # whose options are Hugging Face's, as its first line says
        return
    kinds = [RunOptions] if role == "run" else [registry.kinds(role)[kind] for kind in built_in(role)]
    assert not [(kind, name) for kind in kinds for name, _, meaning in options_of(kind) if not meaning]


def test_components_of_all_roles(call, wide):
    code, out, _ = call("components")
    assert code == 0
    assert all(role in out for role in ROLES)
    assert "prompt = required" in out
    assert "batch_tokens = 8192" in out


def test_an_unknown_role(call):
    code, out, err = call("components", "recurence")
    assert (code, out) == (2, "")
    assert err.startswith("error: role 'recurence' does not exist; did you mean 'recurrence'?")


# ── run ───────────────────────────────────────────────────────────────────────────────────────────
def test_run_prints_plain_lines_and_a_summary(call, tmp_path):
    code, out, err = call("run", "tiny.toml", "--set", "run.steps=7")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "/7" in line] == ["1/7", "3/7", "6/7", "7/7"]
    assert [line.split()[1] for line in lines if "validation:" in line] == ["4", "7"]
    assert "loss" in lines[0]
    assert "tok/s" in lines[0]
    assert "The run is in 'runs/tiny'" in out
    assert "lattice generate runs/tiny" in out
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    for key in ("first_loss", "last_loss", "validation_loss", "validation_bits_per_byte", "peak_memory_mib"):
        assert key.replace("_mib", ", MiB").replace("_", " ") in out
        assert key in summary
    assert "bits_per_byte" not in out, "a figure has one name"
    code, out, _ = call("run", "tiny.toml", "--set", "run.steps=7")
    assert code == 0
    assert "has taken all its 7 steps" in out


def test_a_bad_recipe_is_exit_code_2_and_all_its_problems(call, tmp_path):
    text = (
        RECIPE.replace("hidden_size", "hiden_size").replace("perplexity", "perplexty").replace("3e-2", "-1")
    )
    (tmp_path / "bad.toml").write_text(text)
    code, out, err = call("run", "bad.toml")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 3
    numbered = text.splitlines()
    for key, hint in (
        ("hiden_size", "hidden_size"),
        ("perplexty", "perplexity"),
        ("lr = -1", "greater than 0"),
    ):
        number = next(n for n, line in enumerate(numbered, 1) if key in line)
        assert [one for one in lines if one.startswith(f"error: bad.toml:{number}: ") and hint in one], key
    assert not (tmp_path / "runs").exists()


def test_what_cannot_train_here_is_exit_code_2(call, tmp_path):
    code, _, err = call("run", "tiny.toml", "--set", "backbone.vocab_size=100", "--out", "o")
    assert code == 2
    assert "vocab_size = 100" in err
    code, _, err = call("run", "tiny.toml", "--set", "run.device=tpu", "--out", "o")
    assert code == 2
    assert "run.device = 'tpu'" in err
    (tmp_path / "file").write_text("")
    code, _, err = call("run", "tiny.toml", "--out", "file")
    assert code == 2
    assert err == "error: file is no directory\n"


# ── generate ──────────────────────────────────────────────────────────────────────────────────────
def test_generate_continues_the_prompt_and_a_seed_repeats_it(call, trained):
    common = ("generate", trained, "--prompt", "def ", "--max-new-tokens", "20")
    texts = [call(*common, "--seed", seed)[1] for seed in ("1", "1", "2", "3")]
    assert all(text.startswith("def ") and text.endswith("\n") for text in texts)
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    greedy = [call(*common, "--temperature", "0")[1] for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_generate_from_one_checkpoint(call, trained):
    arguments = ("--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0")
    assert call("generate", trained / "checkpoints" / "step-00000008", *arguments) == call(
        "generate", trained, *arguments
    )


def test_a_prompt_and_a_stop_string_may_begin_with_a_hyphen(call, trained):
    arguments = ("--max-new-tokens", "4", "--temperature", "0", "--stop", "-", "--prompt", "- item")
    code, out, err = call("generate", trained, *arguments)
    assert code == 0, err
    assert out.startswith("- item")


class Recorder(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def test_generate_streams(trained, monkeypatch):
    recorder, errors = Recorder(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", recorder)
    monkeypatch.setattr(sys, "stderr", errors)
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", str(trained), "--prompt", "a", "--max-new-tokens", "20", "--temperature", "0"])
    assert not stop.value.code
    monkeypatch.undo()
    assert errors.getvalue().startswith("prompt of 1 token:")
    lengths = sorted({len(text) for text in recorder.seen})
    assert len(lengths) >= 5, "text comes as it is decoded, not at the end"
    assert all(recorder.getvalue().startswith(text) for text in recorder.seen)


def test_generate_shows_what_the_python_api_computes(call, trained):
    _, out, _ = call("generate", trained, "--prompt", "def ", "--max-new-tokens", "12", "--temperature", "0")
    codec = lattice.codec_of(trained)
    ids = torch.tensor(codec.encode_batch(["def "]))
    expected = lattice.generate(lattice.load(trained), ids, 12, eos_id=codec.eos_id)[0].tolist()
    assert out.rstrip("\n") == codec.decode(expected).rstrip("\ufffd\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x" * 60, "--max-new-tokens", "5"), "a prompt of 60 tokens and 5 new ones do not fit"),
        (("--prompt", "a", "--temperature", "-1"), "temperature = -1.0: must be at least 0"),
        (("--prompt", "a", "--batch", "0"), "batch = 0: must be at least 1"),
        (("--prompt", "a", "--top-p", "2"), "top_p = 2.0: must be in (0, 1]"),
        (("--prompt", "a", "--max-new-tokens", "-1"), "max_new_tokens = -1: must be at least 0"),
        (("--prompt", "a", "--device", "tpu"), "tpu"),
        (
            ("--prompt", "a", "--max-new-tokens", "2", "--out", "/dev/full"),
            "error: /dev/full cannot be written: No",
        ),
        ((), "--prompt"),
    ],
)
def test_what_cannot_be_generated(arguments, message, call, trained):
    code, out, err = call("generate", trained, *arguments)
    assert code == 2
    assert message in err
    assert out == "", "nothing is printed before it is known that the text fits"


# ── export and import ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("option", ["--to", "--out"])
def test_export_is_a_directory_that_loads(option, call, trained, tmp_path):
    code, out, err = call("export", trained, option, "hf")
    assert code == 0, err
    assert "wrote hf" in out
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = lattice.load(trained)(ids).logits
        assert torch.equal(lattice.from_pretrained(tmp_path / "hf")(ids).logits, expected)


def test_import_is_a_recipe_that_runs(call, trained, tmp_path):
    assert call("export", trained, "--to", "hf")[0] == 0
    code, out, err = call(
        *("import", "hf", "--to", "more.toml", "--extends", "tiny.toml"),
        *("--set", "run.steps=2", "recurrence.thoughts=2"),
    )
    assert code == 0, err
    assert "lattice run more.toml" in out
    recipe = lattice.load_recipe("more.toml")
    assert (recipe.run.init_from, recipe.run.steps) == ("hf", 2)
    assert recipe.component("recurrence").thoughts == 2
    code, out, err = call("run", "more.toml")
    assert code == 0, err
    assert "the weights start from 'hf'" in out


# ── what is not there ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "nowhere.toml"),
        ("show", "nowhere.toml"),
        ("generate", "nowhere", "--prompt", "a"),
        ("export", "nowhere", "--to", "hf"),
        ("import", "nowhere", "--to", "new.toml"),
        ("run", "."),
    ],
)
def test_missing_files_are_named(arguments, call, tmp_path):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert f"'{arguments[1]}'" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


@pytest.mark.parametrize("imports", [True, False])
def test_what_to_try_next_works_with_code_of_ones_own(imports, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text('imports = ["/mine.py"]\n' if imports else "")
    show_summary({"steps": 3}, tmp_path)
    assert (
        f'lattice generate {tmp_path} --prompt "def " --trust-imports\n' in capsys.readouterr().out
    ) == imports


def test_commands_and_titles_hold_a_path_as_it_is(call, tmp_path, capsys):
    folder = tmp_path / ("a long path " * 10)
    folder.mkdir()
    (folder / "recipe.toml").touch()
    show_summary({"steps": 3}, folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    assert f"  tensorboard --logdir '{folder}'/tensorboard" in lines
    assert "  lattice check 'my ideas/mine.py'" in call("new", "recurrence", "mine", "--dir", "my ideas")[1]


@pytest.mark.parametrize("figures", [3.25, 123456.789])
def test_training_shows_its_times_on_80_columns(figures, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(console, "console", terminal)
    with console.Training(0, 100_000, 1) as training:
        training.evaluation("validation", 99_999, {"loss": figures})
        training.step({"step": 100_000, "loss": figures, "tokens_per_second": 1e6, "lr": 1e-3})
    *_, last = (line for line in screen.getvalue().splitlines() if "/100000" in line)
    assert re.search(r"loss 3.25\d\d|loss 123456", last)
    assert re.search(r"\d:\d\d:\d\d left \d:\d\d:\d\d", last)
    assert "\n" not in last
    assert len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).strip("\r")) <= 80


def broken_pipe():
    end, pipe = os.pipe()
    os.close(end)
    return pipe


def closed_terminal():
    end, terminal = pty.openpty()
    os.close(end)
    return terminal


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.fixture
def gone(monkeypatch):
    """Replaces stdout or stderr by a stream that cannot be written to."""
    monkeypatch.setattr(console.console, "quiet", False)
    monkeypatch.setattr(console.errors, "quiet", False)
    return lambda name, stream: monkeypatch.setattr(sys, name, os.fdopen(stream(), "w"))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("stream", [broken_pipe, closed_terminal, full_disk])
def test_what_is_shown_of_a_training_does_not_end_it(stream, name, gone, capsys):
    gone(name, stream)
    with console.Training(0, 2, 1) as training:
        training.step({"step": 1, "loss": 3.0, "tokens_per_second": 1e6, "lr": 1e-3})
        training.evaluation("validation", 1, {"loss": 3.0})
        console.warn("a warning")
    console.table("a title", ["a column"], [["a cell"]])
    print("of somebody else", file=getattr(sys, name), flush=True)
    said = capsys.readouterr()
    assert ("validation: loss 3.0" in said.out) == (name == "stderr")
    assert ("stdout cannot be written: " in said.err) == (name == "stdout" and stream != broken_pipe)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (broken_pipe, ""),
        (full_disk, "warning: stdout cannot be written: No space left on device: nothing more is shown\n"),
    ],
)
@pytest.mark.parametrize("arguments", [("show", "tiny.toml"), ("components", "recurrence")])
def test_a_command_that_only_shows_fails_where_it_cannot(arguments, stream, message, gone, call):
    gone("stdout", stream)
    assert call(*arguments) == (1, "", message)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("plan", "--thoughts"),
        ("bench", "--thoughts"),
        ("eval", "--tasks"),
        ("eval", "--few-shot"),
        ("run", "--set"),
    ],
)
def test_an_option_without_the_values_it_takes(command, option, call):
    """It is not as if it had not been there."""
    code, out, err = call(command, "tiny.toml", option)
    assert (code, out) == (2, "")
    assert f"for {option}. Must be followed by at least one value." in err


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("run", "Overrides, table.key=value."),
        ("check", "Options, such as thoughts=2,"),
        ("bench", "Overrides of all recipes, table.key=value."),
        ("sweep", "Overrides of all arms, table.key=value."),
    ],
)
def test_help_says_what_set_overrides(command, overrides, call):
    out = call(command, "--help")[1]
    assert re.search(rf"--set STR\.\.\. +{re.escape(overrides)}", out)
    assert out.splitlines()[0].endswith(" [OPTIONS]"), "after them a recipe would be one more override"


def test_every_option_has_a_text():
    assert not [
        f"{command} {argument.name}"
        for command in cli.app
        if not command.startswith("-")
        for argument in cli.app[command].assemble_argument_collection(parse_docstring=True)
        if not argument.parameter.help
    ]


def test_check_takes_an_option_as_a_recipe_calls_it(call):
    assert "recurrence.thoughts = -1: must be" in call("check", "latent_thoughts", "--set", "thoughts=-1")[2]
    assert call("check", "latent_thoughts", "--set", "recurrence.thoughts=-1") == call(
        "check", "latent_thoughts", "--set", "thoughts=-1"
    )


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("show", "--set", "run.steps=3", "tiny.toml"), "It goes before the options"),
        (("show", "tiny.toml", "run.steps=3"), "To override a recipe: --set run.steps=3"),
        (("generate", "run", "--prompt", "a", "b"), "Quote a value with spaces"),
    ],
)
def test_a_command_line_that_is_likely_meant_otherwise(arguments, hint, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert hint in err


@pytest.mark.parametrize("arguments", [("runn", "tiny.toml"), ("run",), ("show", "tiny.toml", "--orign")])
def test_a_mistyped_command_is_exit_code_2(arguments, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lattice", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == lattice.__version__


def test_a_command_of_one_process_is_refused_where_torchrun_started_more(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", "tiny.toml"])
    said = capsys.readouterr()
    assert not said.out
    assert "rank 0: lattice show: is one process, and torchrun started 2 (WORLD_SIZE)" in said.err
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", "tiny.toml"])
    assert not capsys.readouterr().err, "one rank of a host tells"
