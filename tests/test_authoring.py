"""The tutorial's own code, as printed."""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import lattice
from lattice import cli
from lattice.load import load
from lattice.run_folder import training_steps
from lattice.testing.kit import CHECKS

PAGE = (Path(__file__).parents[1] / "docs" / "authoring.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
COMMANDS = re.search(r"^```\n(lattice check.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[1].splitlines()
SMALL = [
    "run.steps=2",
    "run.batch_tokens=128",
    "backbone.hidden_size=16",
    "backbone.vocab_size=300",
    "tokenizer.vocab_size=300",
    "data.megabytes=0.05",
    "evaluators.validation.max_tokens=128",
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    return tmp_path


def test_the_page_has_its_files():
    assert set(FILES) == {"gated.py", "gated.toml", "test_gated.py", "momentum.py", "momentum.toml"}
    assert len(FILES["gated.py"].splitlines()) < 40
    assert [command.split()[1] for command in COMMANDS] == ["check", "run", "run", "generate"]


def test_the_commands_in_order(files, capsys):
    """As printed, but for the size of the model."""
    for command in COMMANDS:
        name, *arguments = re.findall(r'"[^"]*"|\S+', command)
        assert name == "lattice"
        arguments = [argument.strip('"') for argument in arguments]
        if arguments[0] == "run":
            arguments += ["--set", *SMALL]
        if arguments[0] == "generate":
            arguments += ["--max-new-tokens", "3"]
        with suppress(SystemExit):
            cli.main(arguments)
    assert "all checks hold" in capsys.readouterr().out
    thinking, plain = load("runs/gated", trust_imports=True), load("runs/plain", trust_imports=True)
    own = {name for name, _ in thinking.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert own == {"unroll.gate_D"}
    assert (thinking.unroll.gate_D != 0.5).any()  # trained


def test_the_pytest_file(files):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_gated.py"],
        capture_output=True,
        text=True,
        cwd=files,
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(CHECKS)} passed" in done.stdout


def test_an_optimizer_of_ones_own_goes_on_from_where_it_was(files):
    def losses(out):
        return [row["loss"] for row in training_steps(files / out)]

    small = [*SMALL, "run.steps=4", "checkpoint.every=1"]
    whole = lattice.train("momentum.toml", overrides=small, out="whole")
    lattice.train("momentum.toml", overrides=small, out="parts")
    for path in ("parts/summary.json", "parts/checkpoints/step-00000004", "parts/checkpoints/step-00000003"):
        Path(path).rename("gone")
        shutil.rmtree("gone", ignore_errors=True)
        Path("gone").unlink(missing_ok=True)
    again = lattice.train("momentum.toml", overrides=small, out="parts")
    assert again["last_loss"] == whole["last_loss"] < whole["first_loss"]
    assert losses("parts") == losses("whole")


def test_the_options_check_themselves(files):
    with pytest.raises(lattice.RecipeError, match="steps = -1"):
        lattice.load_recipe("gated.toml", ["recurrence.steps=-1"])
