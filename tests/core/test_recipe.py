"""Recipes: layers, origins, and every way in which a recipe can be wrong."""

import datetime
from pathlib import Path

import pytest
import tomli
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lattice
from lattice.assemble import open_codec
from lattice.recipe import RecipeError, load_recipe

DAY = datetime.date(2020, 1, 1)
BACKBONE = '[backbone]\nkind = "gpt_neox"\nhidden_size = 16\nnum_attention_heads = 2\nnum_hidden_layers = 1\n'
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


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the current directory, so that messages name them by their short name."""
    monkeypatch.chdir(tmp_path)

    def write_(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text, encoding="utf-8", newline="")
        return path

    return write_


@pytest.fixture
def problems(write):
    """The problems of a recipe with this text."""

    def problems_(text, overrides=()):
        with pytest.raises(RecipeError) as caught:
            load_recipe(write("bad.toml", text), overrides)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return caught.value.problems

    return problems_


# ── extends and merging ───────────────────────────────────────────────────────────────────────────
def test_a_recipe_that_says_nothing_gets_the_defaults(write):
    recipe = load_recipe(write("empty.toml", ""))
    assert recipe.name == "empty"
    assert recipe.component("recurrence").kind == "none"
    assert set(recipe.named("metrics")) == {"board"}
    with pytest.raises(RecipeError, match=r"empty: the table \[backbone\] with a `kind` is missing"):
        recipe.component("backbone")


def test_extends_is_relative_to_the_file_that_says_it(write, tmp_path, monkeypatch):
    write("base/common/root.toml", "[run]\nseed = 3\nsteps = 7\n")
    write("base/middle.toml", 'extends = "common/root.toml"\n[run]\nsteps = 8\n')
    path = write("recipes/top.toml", 'extends = ["../base/middle.toml"]\n[run]\nlog_every = 2\n')
    monkeypatch.chdir("/")
    run = load_recipe(path).run
    assert (run.seed, run.steps, run.log_every) == (3, 8, 2)


def test_of_several_extended_files_the_later_wins_and_the_file_itself_over_both(write):
    write("a.toml", "[run]\nseed = 1\nsteps = 1\nlog_every = 1\n")
    write("b.toml", "[run]\nseed = 2\nsteps = 2\n")
    recipe = load_recipe(write("c.toml", 'extends = ["a.toml", "b.toml"]\n[run]\nseed = 3\n'))
    assert (recipe.run.seed, recipe.run.steps, recipe.run.log_every) == (3, 2, 1)
    assert [str(recipe.origin(("run", key))) for key in ("seed", "steps", "log_every")] == [
        "c.toml:3",
        "b.toml:3",
        "a.toml:4",
    ]


def test_one_file_may_be_extended_by_two_ways(write):
    write("root.toml", "[run]\nseed = 5\n")
    write("left.toml", 'extends = "root.toml"\n[run]\nsteps = 1\n')
    write("right.toml", 'extends = "root.toml"\n[run]\nlog_every = 3\n')
    run = load_recipe(write("top.toml", 'extends = ["left.toml", "right.toml"]\n')).run
    assert (run.seed, run.steps, run.log_every) == (5, 1, 3)


def test_a_cycle_names_its_files(write):
    write("a.toml", 'extends = "sub/b.toml"\n')
    write("sub/b.toml", 'extends = "../a.toml"\n')
    with pytest.raises(RecipeError, match=r"a\.toml: extends itself, by way of .*a\.toml -> .*b\.toml"):
        load_recipe("a.toml")
    with pytest.raises(RecipeError, match=r"self\.toml: extends itself"):
        load_recipe(write("self.toml", 'extends = "./self.toml"\n'))


def test_a_missing_file_and_who_asked_for_it(write):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml' does not exist$"):
        load_recipe("nowhere.toml")
    with pytest.raises(FileNotFoundError, match=r"gone\.toml' does not exist \(extended by .*child\.toml\)"):
        load_recipe(write("child.toml", 'extends = "gone.toml"\n'))


def test_an_error_in_an_extended_file_names_that_file(write):
    write("base.toml", "# a comment\n\n[run]\nstepz = 3\n")
    with pytest.raises(RecipeError, match=r"^base\.toml:4: run\.stepz"):
        load_recipe(write("child.toml", 'extends = "base.toml"\n[run]\nsteps = 1\n'))


def test_another_kind_starts_the_table_afresh(write):
    write(
        "base.toml",
        BACKBONE + '[recurrence]\nkind = "latent_thoughts"\nthoughts = 2\njacobi = { train = [1, 1] }\n',
    )
    path = write("child.toml", 'extends = "base.toml"\n[recurrence]\nkind = "none"\n')
    recipe = load_recipe(path)
    assert recipe.table()["recurrence"] == {"kind": "none", "initializer_range": 0.02}
    assert not [key for key in recipe.origins if key[0] == "recurrence" and key[-1] in ("thoughts", "train")]
    assert str(recipe.origin(("recurrence", "kind"))) == "child.toml:3"


def test_the_same_kind_again_keeps_the_options(write):
    write("base.toml", '[recurrence]\nkind = "latent_thoughts"\nthoughts = 2\njacobi = { train = [1, 1] }\n')
    path = write(
        "child.toml",
        'extends = "base.toml"\n[recurrence]\nkind = "latent_thoughts"\njacobi = { eval = 5 }\n',
    )
    recurrence = load_recipe(path).component("recurrence")
    assert (recurrence.thoughts, recurrence.jacobi.train, recurrence.jacobi.eval) == (2, (1, 1), 5)


def test_arrays_replace(write):
    write("base.toml", '[recurrence]\nkind = "latent_thoughts"\njacobi = { train = [1, 6], eval = 2 }\n')
    path = write("child.toml", 'extends = "base.toml"\n[recurrence.jacobi]\ntrain = [3, 4]\n')
    recipe = load_recipe(path)
    assert recipe.component("recurrence").jacobi.train == (3, 4)
    assert str(recipe.origin(("recurrence", "jacobi", "train"))) == "child.toml:3"
    assert str(recipe.origin(("recurrence", "jacobi", "eval"))) == "base.toml:3"


def test_a_stray_kind_at_the_top_is_unknown_and_hides_no_other_problem(problems):
    found = problems('kind = "gpt_neox"\n[run]\nstepz = 1\n')
    assert [one.split(" Known")[0] for one in found] == [
        "bad.toml:1: unknown table 'kind'.",
        "bad.toml:3: run.stepz: unknown option; did you mean 'steps'?",
    ]


# ── --set ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("run.steps=12", ("run", "steps"), 12),
        ("run.steps=1_000", ("run", "steps"), 1000),
        ("run.device=cpu", ("run", "device"), "cpu"),
        ("run.device='cpu'", ("run", "device"), "cpu"),
        ("run.device = cpu", ("run", "device"), "cpu"),
        ("optimizer.lr=3e-4", ("optimizer", "lr"), 3e-4),
        ("optimizer.betas=[0.8, 0.9]", ("optimizer", "betas"), [0.8, 0.9]),
        ("backbone.tie_word_embeddings=true", ("backbone", "tie_word_embeddings"), True),
        ("evaluators.validation.every=0", ("evaluators", "validation", "every"), 0),
        ("recurrence.jacobi={ train = [0, 1] }", ("recurrence", "jacobi", "train"), [0, 1]),
        ("recurrence.jacobi.eval=9", ("recurrence", "jacobi", "eval"), 9),
    ],
)
def test_set_has_toml_values_and_bare_words(override, path, value, write):
    recipe = load_recipe(
        write("r.toml", BACKBONE + '[recurrence]\nkind = "latent_thoughts"\n'),
        [override],
    )
    found = recipe.table()
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)
    assert str(recipe.origin(path)) == "--set"


@pytest.mark.parametrize("override", ["run.steps", "=3", "run..steps=3", ".steps=3", ""])
def test_a_malformed_override_is_quoted(override, write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("r.toml", ""), [override])
    assert str(caught.value) == f"--set {override}: must be of the form table.key=value"


def test_overrides_cannot_descend_into_a_value(write):
    with pytest.raises(RecipeError, match=r"--set run\.steps=1: 'run' is already set to 3"):
        load_recipe(write("r.toml", ""), ["run=3", "run.steps=1"])


def test_errors_in_overrides_name_them(problems):
    assert problems("", ["run.steps=abc", "optimizer.lr=-1", "optimiser.lr=1"]) == [
        "--set: unknown table 'optimiser'; did you mean 'optimizer'? Known: run, backbone, recurrence, mask, "
        "loss, precision, activation_checkpoint, compile, parallel, optimizer, schedule, tokenizer, data, "
        "checkpoint, metrics, evaluators",
        '--set: run.steps = "abc": input should be a valid integer',
        "--set: optimizer.lr = -1: must be greater than 0",
    ]


def test_set_changes_a_kind_and_its_options_together(write):
    path = write("r.toml", BACKBONE + '[recurrence]\nkind = "latent_thoughts"\nthoughts = 3\n')
    recipe = load_recipe(path, ["recurrence.kind=none", "recurrence.initializer_range=0.5"])
    assert recipe.table()["recurrence"] == {"kind": "none", "initializer_range": 0.5}


@pytest.mark.parametrize("override", ["extends=other.toml", "imports=mine.py", "imports=[3]"])
def test_set_of_what_belongs_in_the_file_is_refused_and_not_ignored(override, problems):
    assert problems("", [override])[0].startswith("--set")


# ── origins ───────────────────────────────────────────────────────────────────────────────────────
WRITTEN = """\
# line 1
run.seed = 1                         # line 2: a dotted key
run."steps" = 12

[ backbone ]   # a header with spaces
kind = "gpt_neox"
hidden_size =   32

    num_attention_heads = 4

[recurrence]
kind = "latent_thoughts"
jacobi = { train = [2,
  4
], eval = 3 }                        # the inline table starts at line 13
thoughts = 2
[optimizer]
kind = "adamw"
betas = [    # line 19
    0.8,

    0.9,     # ] not the end
]
lr = 0.5
[evaluators.a]
kind = "sample"
prompt = '''
[run]
steps = 99
'''
every = 7
[evaluators.'b.c']
kind = "perplexity"
"""
LINES = {
    "run.seed": 2,
    "run.steps": 3,
    "backbone.kind": 6,
    "backbone.hidden_size": 7,
    "backbone.num_attention_heads": 9,
    "recurrence.kind": 12,
    "recurrence.jacobi.train": 13,
    "recurrence.jacobi.eval": 13,
    "recurrence.thoughts": 16,
    "optimizer.kind": 18,
    "optimizer.betas": 19,
    "optimizer.lr": 24,
    "evaluators.a.kind": 26,
    "evaluators.a.prompt": 27,
    "evaluators.a.every": 31,
}


def leaves(table, above=()):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_leaf_knows_its_line(newline, write):
    recipe = load_recipe(write("r.toml", WRITTEN.replace("\n", newline)))
    assert recipe.run.steps == 12
    found = {".".join(path): str(recipe.origin(path)) for path, _ in leaves(tomli.loads(WRITTEN))}
    assert found.pop("evaluators.b.c.kind") == "r.toml:33"
    assert found == {key: f"r.toml:{line}" for key, line in LINES.items()}


def test_a_line_separator_that_toml_does_not_know_counts_no_line(problems):
    text = "# \u2028 \u0085\n[evaluators.s]\nkind = 'sample'\nprompt = '\u2028'\n[run]\nstepz = 1\n"
    assert problems(text)[0].startswith("bad.toml:6: run.stepz")


def test_every_leaf_of_the_resolved_recipe_has_an_origin(write):
    recipe = load_recipe(write("r.toml", WRITTEN), ["run.log_every=3"])
    origins = {path: str(recipe.origin(path)) for path, _ in leaves(recipe.table())}
    written = {path: origin for path, origin in origins.items() if origin.startswith("r.toml:")}
    assert len(written) == len(LINES) + 1
    assert origins[("run", "log_every")] == "--set"
    assert origins[("optimizer", "eps")] == "default of adamw"
    assert origins[("mask", "kind")].startswith("lattice/defaults.toml:")
    defaults = (Path(__file__).parents[2] / "lattice" / "defaults.toml").read_text().splitlines()
    assert defaults[int(origins[("mask", "kind")].split(":")[1]) - 1] == 'kind = "causal"'


# ── what can be wrong ─────────────────────────────────────────────────────────────────────────────
def test_all_problems_at_once_each_with_its_line(problems):
    found = problems(
        BACKBONE  # lines 1 to 5
        + """hiden_size = 3
[recurrence]
kind = "latent_thougths"
[run]
steps = "many"
seed = -1

[optimzer]
kind = "adamw"
[schedule]
warmup = 0.5
kind = "cosine"
decay = 1
[mask]
kind = "causal"
[evaluators.text]
kind = "sample"
"""
    )
    assert {one.split(" Known")[0] for one in found} == {
        "bad.toml:13: unknown table 'optimzer'; did you mean 'optimizer'?",
        "bad.toml:6: backbone.hiden_size: unknown option; did you mean 'hidden_size'?",
        "bad.toml:8: recurrence.kind: kind 'latent_thougths' of role 'recurrence' does not exist; did you "
        "mean 'latent_thoughts'?",
        'bad.toml:10: run.steps = "many": input should be a valid integer',
        "bad.toml:18: schedule.decay: unknown option.",
        "bad.toml:21: evaluators.text.prompt: missing",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi = { trian = [1, 2] }\n",
         "bad.toml:3: recurrence.jacobi.trian: unknown option; did you mean 'train'? Known: train, eval"),
        ("[recurrence]\nkind = 'latent_thoughts'\n[recurrence.jacobi]\n\neval = -1\n",
         "bad.toml:5: recurrence.jacobi.eval = -1: must be at least 0"),
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi.train = [4, 2]\n",
         "bad.toml:3: recurrence.jacobi.train = [4, 2]: must be a range [low, high] with 0 <= low <= high"),
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi.train = [4]\n",
         "bad.toml:3: recurrence.jacobi.train = [4]: has too few values"),
        ("[recurrence]\nkind = 'latent_thoughts'\nthoughts = 1.0\n",
         "bad.toml:3: recurrence.thoughts = 1.0: input should be a valid integer"),
        ("[recurrence]\nthoughts = 1\nkind = 'none'\n",
         "bad.toml:2: recurrence.thoughts: unknown option. Known: initializer_range"),
        ("[run]\n\nbatch_tokens = 100\nsequence_tokens = 30\n",
         "bad.toml:3: run.batch_tokens = 100: must be a multiple of sequence_tokens = 30"),
        ("[run]\nseed = true\n", "bad.toml:2: run.seed = true: input should be a valid integer"),
        ("[run]\nseed = '3'\n", 'bad.toml:2: run.seed = "3": input should be a valid integer'),
        ("[run]\nkind = 'long'\n",
         "bad.toml:2: run.kind: unknown option. Known: seed, steps, batch_tokens, sequence_tokens, "
         "micro_batch, device, init_from, timeout, log_every"),
        ("run = 3\n", "bad.toml:1: [run] must be a table, not 3"),
        ("evaluators = 3\n", "bad.toml:1: [evaluators] must hold named tables, [evaluators.name]"),
        ("mask = 'causal'\n", "bad.toml:1: [mask] must be a table, not 'causal'"),
        ("[backbone]\nhidden_size = 3\n", "bad.toml:1: [backbone] has no `kind`; known: gpt_neox, llama"),
        ("[backbone]\n\nkind = 3\n",
         "bad.toml:3: backbone.kind = 3: must be a string; known: gpt_neox, llama"),
        ("[backbone]\nkind = ['llama']\n",
         'bad.toml:2: backbone.kind = ["llama"]: must be a string; known: gpt_neox, llama'),
        ("[backbone]\nkind = 'gpt_neox'\n\nhidden_size = 2020-01-01\n",
         'bad.toml:4: backbone.hidden_size = "2020-01-01": must not hold a date'),
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi = { train = [1, 07:32:00] }\n",
         'bad.toml:3: recurrence.jacobi = {"train": [1, "07:32:00"]}: must not hold a time'),
        ("[run]\nsteps = \n", "bad.toml:2: no valid TOML: Invalid value (at line 2, column 9)"),
        ("[run]\nsteps = 1\n\nsteps = 2\n",
         "bad.toml:4: no valid TOML: Cannot overwrite a value (at line 4, column 10)"),
        (b"[run]\nsteps = 1 # \xff\n", "bad.toml: not UTF-8 at byte 18"),
        ("imports = 'mine.py'\n", "bad.toml:1: imports = 'mine.py': must be a list of strings"),
        ("\nextends = [3]\n", "bad.toml:2: extends = [3]: must be a list of file names"),
    ],
)  # fmt: skip
def test_the_message_for(text, message, problems):
    assert problems(text) == [message]


def test_every_rule_of_the_run_table_names_its_line(problems):
    for line in ("steps = 0", "batch_tokens = -256", "sequence_tokens = 0", "log_every = 0", "seed = -1"):
        key = line.split()[0]
        assert problems(f"[run]\n# a comment\n{line}\n")[0].startswith(f"bad.toml:3: run.{key} = "), line
    assert problems("[run]\nmicro_batch = 3\n") == [
        "bad.toml:2: run.micro_batch = 3: must divide the 32 sequences of a batch "
        "(batch_tokens / sequence_tokens)"
    ]


def test_a_dict_is_checked_the_same_way():
    with pytest.raises(RecipeError) as caught:
        load_recipe({"run": {"stepz": 3}, "backbone": {"kind": "gpt_neox", "hidden_size": DAY}})
    assert [one[: one.index(":", 6)] for one in caught.value.problems] == [
        "dict: run.stepz",
        'dict: backbone.hidden_size = "2020-01-01"',
    ]
    with pytest.raises(RecipeError, match="dict: imports = 'mine': must be a list"):
        load_recipe({"imports": "mine"})


# ── a user's own file ─────────────────────────────────────────────────────────────────────────────
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


# ── round trip and random damage ──────────────────────────────────────────────────────────────────
def test_the_resolved_recipe_loads_to_the_same(write):
    recipe = load_recipe(write("r.toml", WRITTEN), ["backbone.tie_word_embeddings=true"])
    again = load_recipe(recipe.table())
    assert (again.run, again.components) == (recipe.run, recipe.components)
    from_text = load_recipe(write("resolved.toml", recipe.to_toml()))
    assert (from_text.run, from_text.components) == (recipe.run, recipe.components)
    assert from_text.table() == recipe.table() == tomli.loads(recipe.to_toml())
    assert load_recipe(recipe) is recipe
    assert load_recipe(recipe, ["run.seed=9"]).run.seed == 9


VALID = tomli.loads(WRITTEN)
KEYS = st.sampled_from(["kind", "steps", "train", "jacobi", "imports", "extends", "x", "", "a.b", "run", "é"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["none", "latent_thoughts", "sample", "cpu", "default"])
    | st.dates()
    | st.times()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


def without_none(value):
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value if one is not None] if isinstance(value, list) else value


@st.composite
def damaged(draw):
    """A valid recipe with one to three places changed, removed or added."""

    def damage(table, path, value):
        key = path[0]
        if len(path) > 1 and isinstance(table.get(key), dict):
            return {**table, key: damage(table[key], path[1:], value)}
        return {**table, key: value}

    table = VALID
    places = [path for path, _ in leaves(VALID)] + [(key,) for key in VALID]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places))
        path = draw(st.sampled_from([path, (*path[:-1], draw(KEYS))]))
        table = damage(table, path, draw(VALUES))
    return without_none(table)


def problems_of(recipe, overrides=()):
    """None, or the problems; any other exception than those promised passes through."""
    try:
        load_recipe(recipe, overrides)
    except FileNotFoundError as error:
        return [str(error)]
    except RecipeError as error:
        return error.problems
    return None


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=damaged())
def test_whatever_a_recipe_holds_the_answer_is_a_recipe_or_its_problems(table, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8", newline="")
    for recipe, place in ((path, "damaged.toml"), (table, "dict")):
        found = problems_of(recipe)
        if found is None:
            loaded = load_recipe(recipe)
            again = load_recipe(loaded.table())
            assert repr((again.run, again.components)) == repr((loaded.run, loaded.components))
            continue
        assert found
        for problem in found:
            assert place in problem or "does not exist" in problem, problem


SET = st.tuples(KEYS, KEYS, st.text(max_size=6) | st.sampled_from(["1", "[1]", "{a=1}"]))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(SET, max_size=3))
def test_whatever_is_set_the_answer_is_a_recipe_or_its_problems(overrides):
    found = problems_of(VALID, [f"{table}.{key}={value}" for table, key, value in overrides])
    assert found is None or all(one.startswith(("--set", "dict")) for one in found), found
