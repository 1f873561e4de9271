"""extends, merging, and --set over both; a resolved recipe loads to the same."""

import pytest
import tomli

from lattice.cli import main
from lattice.recipe import RecipeError, load_recipe
from tests.recipe.texts import BACKBONE, WRITTEN


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


def test_a_file_that_two_others_extend_undoes_neither(write):
    write("root.toml", "[run]\nseed = 5\nsteps = 5\nlog_every = 5\n")
    write("left.toml", 'extends = "root.toml"\n[run]\nseed = 1\nsteps = 1\n')
    write("sub/right.toml", 'extends = "../root.toml"\n[run]\nsteps = 3\n')
    for names in ('"left.toml", "sub/right.toml"', '"left.toml", "sub/right.toml", "root.toml"'):
        recipe = load_recipe(write("top.toml", f"extends = [{names}]\n"))
        assert (recipe.run.seed, recipe.run.steps, recipe.run.log_every) == (1, 3, 5), names
        assert str(recipe.origin(("run", "seed"))) == "left.toml:3"


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
    long = write("long.toml", f'extends = "{"x" * 5000}.toml"\n')
    with pytest.raises(RecipeError, match=r"xxx\.toml' \(extended by .*long\.toml\): File name too long"):
        load_recipe(long)
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


def test_what_another_kind_drops_though_it_has_it_is_said(write, capsys):
    extended = BACKBONE + '[recurrence]\nkind = "latent_thoughts"\nthoughts = 2\njacobi = { eval = 2 }\n'
    write("base.toml", extended)
    text = 'extends = "base.toml"\n[backbone]\nkind = "llama"\nnum_attention_heads = 4\n'
    path = write("child.toml", text)
    said = (
        "child.toml:3: backbone.kind = 'llama' begins the table anew, without hidden_size = 16, "
        "num_hidden_layers = 1"
    )
    assert load_recipe(path).dropped == (said,)  # not the heads, which are set again
    with pytest.raises(SystemExit, match="0"):
        main(["show", str(path), "--set", "recurrence.kind=ponder"])
    assert capsys.readouterr().err.splitlines() == [f"warning: {said}"]  # ponder has no thoughts, no jacobi
    assert load_recipe("base.toml", ["backbone.kind=gpt_neox", "recurrence.kind=none"]).dropped == ()


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
        (" recurrence . 'jacobi'.\"eval\" = 9", ("recurrence", "jacobi", "eval"), 9),
        ("evaluators.'a.b=c'.kind=perplexity", ("evaluators", "a.b=c", "kind"), "perplexity"),
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


@pytest.mark.parametrize("override", ["run.steps", "=3", "run..steps=3", ".steps=3", "", "a.'b=3", "x\ny=3"])
def test_a_malformed_override_is_quoted(override, write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("r.toml", ""), [override])
    assert str(caught.value) == f"--set {override}: must be of the form table.key=value"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["recurrence.thoughts=3", "recurrence={solver='jacobi'}"], {"thoughts": 3, "solver": "jacobi"}),
        (["recurrence={solver='jacobi'}", "recurrence.thoughts=3"], {"thoughts": 3, "solver": "jacobi"}),
        (["recurrence={jacobi={eval=5}}", "recurrence={thoughts=3}"], {"thoughts": 3}),
        (["recurrence.jacobi.eval=5", "recurrence={jacobi={train=[1, 1]}}"], {}),
        (["recurrence.thoughts=3", "recurrence={kind='latent_thoughts'}"], {"thoughts": 3}),
        (["recurrence={thoughts=3}", "recurrence={thoughts=2}"], {"thoughts": 2}),
        (["recurrence={kind='loop', loops=3}", "recurrence={kind='pause', pauses=2}"], {"pauses": 2}),
        (["recurrence.kind=pause", "recurrence={pauses=2}"], {"kind": "pause", "pauses": 2}),
    ],
)
def test_a_table_that_is_set_keeps_what_was_set_in_it(overrides, expected, write):
    path = write("r.toml", BACKBONE + '[recurrence]\nkind = "latent_thoughts"\nsolver = "gauss_seidel"\n')
    table = load_recipe(path, overrides).table()["recurrence"]
    assert {key: table[key] for key in expected} == expected
    if any("eval=5" in one for one in overrides):
        assert table["jacobi"]["eval"] == 5


@pytest.mark.parametrize("more", ["run.seed = 5", "[run]\nseed = 5", "b.c = 1\nrun = {}"])
def test_set_of_several_values_is_refused_and_not_cut_short(more, write):
    with pytest.raises(RecipeError, match=r"(?s)^--set run\.steps=3\n.*: must hold one value, and '.*run'"):
        load_recipe(write("r.toml", ""), [f"run.steps=3\n{more}"])


def test_a_bare_word_may_have_several_lines(write):
    override = "evaluators.text={kind='sample', prompt='x'}"
    recipe = load_recipe(write("r.toml", BACKBONE), [override, "evaluators.text.prompt=def f():\n  return"])
    assert recipe.named("evaluator")["text"].prompt == "def f():\n  return"


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


def test_no_clipping_and_all_tokens_can_be_said_and_stay_said(write):
    path = write("r.toml", BACKBONE + '[evaluators.text]\nkind = "sample"\nprompt = "x"\n')
    recipe = load_recipe(path, ["optimizer.grad_clip=0", "evaluators.text.top_p=1"])
    again = load_recipe(load_recipe(write("resolved.toml", recipe.to_toml())), ["run.seed=9"])
    assert (again.component("optimizer").grad_clip, again.named("evaluator")["text"].top_p) == (0, 1)


def test_the_resolved_recipe_loads_to_the_same(write):
    recipe = load_recipe(write("r.toml", WRITTEN), ["backbone.tie_word_embeddings=true"])
    again = load_recipe(recipe.table())
    assert (again.run, again.components) == (recipe.run, recipe.components)
    from_text = load_recipe(write("resolved.toml", recipe.to_toml()))
    assert (from_text.run, from_text.components) == (recipe.run, recipe.components)
    assert from_text.table() == recipe.table() == tomli.loads(recipe.to_toml())
    assert load_recipe(recipe) is recipe
    assert load_recipe(recipe, ["run.seed=9"]).run.seed == 9
