"""A user's own file: found from the recipe, named where it fails, not run where that is not trusted."""

from pathlib import Path

import pytest

import lattice
from lattice.build import build_model
from lattice.codec import open_codec
from lattice.recipe import RecipeError, load_recipe
from tests.recipe.texts import BACKBONE

MLP = """
@dataclass(frozen=True, kw_only=True)
class MLP:
    factor: float = 4.0
"""
USER_RECURRENCE = """
from dataclasses import dataclass
from lattice.components.recurrence.none import OnePass
from lattice.protocols import Initialization, Pass, Recurrence, Shape, Unroll
from lattice.registry import register


@register("recurrence", "KIND")
@dataclass(frozen=True, kw_only=True)
class Mine(Recurrence):
    '''A user's own.'''

    gain: float = 1.0

    def __post_init__(self):
        if self.gain <= 0:
            raise ValueError(f"gain = {self.gain}: must be greater than 0")

    @property
    def slots(self):
        return 1

    @property
    def parallel_is_exact(self):
        return True

    def passes(self, shape, *, training):
        return [Pass()]

    def initialization(self, shape):
        return Initialization(std=0.02, residual_std=0.02)

    def build(self, shape):
        return OnePass()
"""


def test_imports_bring_a_component_relative_to_the_recipe(write, monkeypatch):
    write("lab/code/mine.py", USER_RECURRENCE.replace("KIND", "relative_to_the_recipe"))
    write("lab/base/b.toml", 'imports = ["../code/mine.py"]\n')
    path = write(
        "lab/r.toml",
        'extends = "base/b.toml"\n'
        + BACKBONE
        + '[recurrence]\nkind = "relative_to_the_recipe"\ngain = 2.0\n',
    )
    monkeypatch.chdir("/")
    recipe = load_recipe(path)
    assert recipe.component("recurrence").gain == 2.0
    assert recipe.imports == (str(path.parent / "code/mine.py"),)
    again = load_recipe(recipe.table())
    assert again.components == recipe.components
    assert again.imports == recipe.imports
    with pytest.raises(RecipeError, match=r"r\.toml:9: recurrence\.gain = -1\.0: must be greater than 0"):
        load_recipe(write("lab/r.toml", path.read_text().replace("2.0", "-1.0")))


def test_an_option_that_the_shape_does_not_allow_is_named_where_it_is_written(write, problems):
    """One of a table as well: the table is what a recipe or --set has written."""
    user = USER_RECURRENCE.replace("KIND", "with_a_table").replace(
        "    gain: float = 1.0\n", "    gain: float = 1.0\n    mlp: MLP = MLP()\n"
    )
    user = user.replace("@register", MLP + "\n\n@register").replace(
        "        return OnePass()",
        '        raise ValueError(f"mlp.factor = {self.mlp.factor}: too small for {shape.hidden_size}")',
    )
    write("table.py", user)
    path = write("r.toml", 'imports = ["table.py"]\n' + BACKBONE + '[recurrence]\nkind = "with_a_table"\n')
    for recipe, place in (
        (load_recipe(path, ["recurrence.mlp.factor=0.5"]), "--set"),
        (load_recipe(write("s.toml", path.read_text() + "mlp = { factor = 0.5 }\n")), r"s\.toml:9"),
    ):
        with pytest.raises(RecipeError, match=rf"^{place}.*: recurrence\.mlp\.factor = 0\.5: too small"):
            build_model(recipe)


def test_a_file_that_does_not_import_is_named_with_its_line_and_reason(write, problems):
    write("raises.py", "1 / 0\n")
    write("syntax.py", "def (:\n")
    write("incomplete.py", USER_RECURRENCE.replace("KIND", "incomplete").replace("def build", "def bild"))
    found = problems(
        'imports = ["raises.py",\n "gone.py", "syntax.py", "incomplete.py", "no.such.package"]\n'
    )
    assert len(found) == 5
    for line, reason in zip(
        found,
        ["ZeroDivisionError: division by zero", "gone.py does not exist", "SyntaxError", "'build' is missing",
         "No module named 'no'"],
        strict=True,
    ):  # fmt: skip
        assert line.startswith("bad.toml:1: imports: '")
        assert reason in line


def test_a_failed_import_hides_no_other_problem(write, problems):
    write("raises.py", "1 / 0\n")
    found = problems('imports = ["raises.py"]\n[run]\nstep = 3\n[optimizer]\nkind = "adamw"\nlr = -1.0\n')
    assert len(found) == 3
    for line, part in zip(found, ("ZeroDivisionError", "run.step", "optimizer.lr = -1"), strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('kind = "pause"\npause_token_id = 128', "r.toml:6: recurrence.pause_token_id = 128: must be a row"),
        (
            'kind = "depth"\ncoda = 5',
            "default of depth: recurrence.prelude = 1: with coda = 5 leaves none of the 6 layers",
        ),
    ],
)
def test_options_that_the_backbone_does_not_allow(write, table, message):
    path = write("r.toml", f'[backbone]\nkind = "gpt_neox"\nvocab_size = 128\n[recurrence]\n{table}\n')
    with pytest.raises(RecipeError) as caught:
        lattice.build_model(path, device="meta")
    assert str(caught.value).startswith(message)


def test_a_tokenizer_that_reaches_the_pause_row_is_refused():
    tables = {
        "backbone": {"kind": "gpt_neox", "vocab_size": 260},
        "recurrence": {"kind": "pause", "pause_token_id": 30},
    }
    with pytest.raises(
        RecipeError, match=r"'pause' uses row 30 .* raise backbone.vocab_size to 25\d at least"
    ):
        open_codec(load_recipe(tables), None)
    tables["recurrence"] = {"kind": "pause"}
    assert open_codec(load_recipe(tables), None).vocab_size < 260


def test_a_file_that_was_repaired_imports_in_the_same_process(write):
    path = write("r.toml", 'imports = ["mine.py"]\n[recurrence]\nkind = "repaired"\n')
    write("mine.py", USER_RECURRENCE.replace("KIND", "repaired") + "\nraise OSError('not yet')\n")
    with pytest.raises(RecipeError, match="OSError: not yet"):
        load_recipe(path)
    write("mine.py", USER_RECURRENCE.replace("KIND", "repaired") + "\n# now with more bytes than before\n")
    assert load_recipe(path).component("recurrence").kind == "repaired"


def test_imports_can_be_refused_and_then_nothing_runs(write):
    write("mine.py", "from pathlib import Path\nPath('ran').touch()\n")
    path = write("r.toml", 'imports = ["mine.py"]\n')
    table = {"imports": [str(path.parent / "mine.py")]}
    for recipe in (path, table):
        with pytest.raises(RecipeError, match=r"imports code .*mine\.py.*trust_imports"):
            load_recipe(recipe, allow_imports=False)
    with pytest.raises(RecipeError, match="trust_imports"):
        load_recipe(write("plain.toml", ""), ["imports=['mine.py']"], allow_imports=False)
    assert not Path("ran").exists()
    load_recipe(path)
    assert Path("ran").exists()
