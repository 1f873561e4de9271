"""One place for the runs of all these tests; whole runs that are compared with are computed once."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lattice
from lattice.prepare import prepare
from tests.integration.training_runs import RECIPE, rows


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The recipe and the user's file."""
    folder = tmp_path_factory.mktemp("training")
    shutil.copy(Path(__file__).parent / "user.py", folder)
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _surroundings(place):
    """A cache of their own; torch on one thread, as in the subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture
def train(place, tmp_path):
    """Trains the tiny recipe with overrides, in `tmp_path/run` if not told otherwise."""

    def train_(*overrides, out=None):
        return lattice.train(train_.recipe, overrides=list(overrides), out=out or tmp_path / "run")

    train_.recipe = place / "tiny.toml"
    return train_


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def short_documents(place):
    """Prepared documents that are shorter than a sequence, so that each sequence holds several."""
    text = "".join(json.dumps({"text": f"{n} {n * n}"}) + "\n" for n in range(1500))
    (place / "short.jsonl").write_text(text)
    out = place / "short"
    prepare([str(place / "short.jsonl")], out, "bytes", validation_fraction=0.1, show_progress=False)
    return ("data.kind=packed_tokens", f"data.path={out}", "run.steps=6")
