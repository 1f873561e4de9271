"""Recipes and runs that start from weights of Hugging Face."""

import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lattice
from lattice import state
from lattice.assemble import training_graph
from lattice.components.tokenizer.bytes import BytesCodec
from lattice.hf.importing import import_recipe
from lattice.hf.tokenizer import export_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*multiplies the embeddings by:UserWarning")  # on purpose

SIZES = {
    "vocab_size": 260,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
BASE = """
[run]
steps = 1
batch_tokens = 64
sequence_tokens = 16
device = "cpu"

[data]
kind = "embedded"
megabytes = 0.3
validation_fraction = 0.3

[optimizer]
kind = "adamw"
lr = 1e-30

[evaluators.validation]
kind = "perplexity"
max_tokens = 256
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@torch.no_grad()
def made_by_transformers(kind, folder, **settings):
    made, config = {
        "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    }[kind]
    if kind == "gpt_neox":
        settings |= {"rotary_pct": 0.5, "rotary_emb_base": 500}
    model = made(config(**SIZES, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    export_tokenizer(BytesCodec(), folder / "none", folder, 64)
    return model


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return folder, {kind: made_by_transformers(kind, folder / kind) for kind in ("gpt_neox", "llama")}


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    """A directory to work in, with weights and a recipe of everything else."""
    monkeypatch.chdir(tmp_path)
    for kind in originals[1]:
        shutil.copytree(originals[0] / kind, tmp_path / kind)
    (tmp_path / "base.toml").write_text(BASE)
    return tmp_path


def imported(folder="gpt_neox", *, to="new.toml", overrides=(), extends=("base.toml",)):
    return import_recipe(folder, to, overrides=overrides, extends=extends)


# ── what comes out ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_the_first_validation_loss_is_the_models(kind, here, originals, capsys):
    imported(kind)
    summary = lattice.train("new.toml", out="run")
    assert f"the weights start from '{kind}'" in capsys.readouterr().out
    graph = training_graph(lattice.load_recipe("new.toml"), here / "run")
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in graph.source.validation(256):
            logits = originals[1][kind](batch.ids_BL).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BL.flatten())
            total, count = total + float(loss) * batch.targets_BL.numel(), count + batch.targets_BL.numel()
    assert count >= 240
    assert summary["validation_loss"] == pytest.approx(total / count, rel=1e-5)
    assert abs(total / count - math.log(260)) > 0.1, "a comparison of constants would tell nothing"


def test_thoughts_are_added_to_unscaled_embeddings(here):
    imported(overrides=["recurrence.kind=latent_thoughts", "recurrence.thoughts=2"])
    text = (here / "new.toml").read_text()
    assert [line for line in text.splitlines() if line.startswith("embed_scale = 1.0  ")]
    recipe = lattice.load_recipe("new.toml")
    assert recipe.component("recurrence").embed_scale == 1.0
    model = training_graph(recipe, here / "run").model
    table = {"kind": "latent_thoughts", "thoughts": 2, "embed_scale": 1.0}
    expected = lattice.from_pretrained("gpt_neox", table)
    ids = torch.arange(16)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        (["recurrence.kind=loop", "recurrence.embed_scale=3.0"], 3.0),
        (["recurrence.kind=loop"], 1.0),
        ([], None),
    ],
)
def test_a_scale_that_was_set_stays_and_a_plain_model_has_none(overrides, scale, here):
    recurrence = imported(overrides=overrides).component("recurrence")
    assert getattr(recurrence, "embed_scale", None) == scale
    assert lattice.load_recipe("new.toml").component("recurrence") == recurrence


KINDS = ("latent_thoughts", "loop", "pause", "ponder", "hidden_ponder", "depth")
SCALED = st.builds(
    lambda kind, scale, feedback: {"kind": kind} | scale | (feedback if kind == "latent_thoughts" else {}),
    st.sampled_from(KINDS),
    st.sampled_from([{}, {"embed_scale": 3.0}]),
    st.sampled_from([{}, {"feedback": "softmax"}]),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(trained=st.one_of(st.just({"kind": "none"}), SCALED), now=SCALED)
def test_another_recurrence_keeps_the_scale_that_the_weights_were_trained_with(trained, now, originals):
    """Unless somebody says another; from_pretrained warns where nobody did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        window = {"mask": {"kind": "causal", "window": 8}}  # no architecture of transformers, whatever thinks
        model = lattice.from_pretrained(originals[0] / "gpt_neox", trained, overrides=window)
        lattice.save_pretrained(model, folder)
        export_tokenizer(BytesCodec(), folder / "none", folder, 64)
        before = model.recurrence.embedding_scale(model.shape)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scale = lattice.from_pretrained(folder, now).recurrence.embedding_scale(model.shape)
        said = [f"{folder}: recurrence '{now['kind']}' multiplies" in str(one.message) for one in caught]
        assert any(said) == (scale != before and "embed_scale" not in now)
        expected = now.get("embed_scale") or before
        overrides = [f"recurrence.{name}={value}" for name, value in now.items()]
        if now["kind"] == trained["kind"]:  # its own options stay
            expected = now.get("embed_scale") or trained.get("embed_scale") or expected
        imported = import_recipe(folder, folder / "new.toml", overrides=overrides)
        assert imported.component("recurrence").embedding_scale(model.shape) == expected
        assert lattice.load_recipe(folder / "new.toml").table() == imported.table()


@pytest.mark.parametrize(
    "table",
    [
        {"thoughts": 0},
        {"kind": "loop", "loops": 0},
        {"kind": "pause", "pauses": 0},
        {"kind": "ponder", "steps": 0},
    ],
)
def test_no_thoughts_added_to_a_plain_model_change_nothing(table, here, originals):
    overrides = [f"recurrence.{key}={value}" for key, value in {"kind": "latent_thoughts", **table}.items()]
    model = training_graph(imported(overrides=overrides), here / "run").model
    ids = torch.arange(16)[None]
    torch.testing.assert_close(model(ids).logits, originals[1]["gpt_neox"](ids).logits)


def test_a_scale_that_is_lost_is_said(here, capsys):
    """`none` has no option for it; a recipe by hand may leave it out."""
    lattice.save_pretrained(
        lattice.from_pretrained("gpt_neox", {"kind": "loop", "embed_scale": 3.0}), "looped"
    )
    export_tokenizer(BytesCodec(), here / "none", here / "looped", 64)
    with pytest.warns(UserWarning, match=r"looped: recurrence 'none' multiplies .* by 1; .*trained with 3, "):
        lattice.from_pretrained("looped", {"kind": "none"})
    imported("looped")
    training_graph(lattice.load_recipe("new.toml", ["recurrence.kind=hidden_ponder"]), here / "run")
    note = "note: recurrence 'hidden_ponder' multiplies the embeddings by 1; the weights were trained with 3,"
    assert note in capsys.readouterr().out


def test_the_recipe_says_what_the_weights_say_and_extends_the_rest(here):
    (here / "deep").mkdir()
    given = imported("llama", to="deep/new.toml", overrides=["run.steps=3"])
    read = lattice.load_recipe("deep/new.toml")
    assert read.table() == given.table()
    assert read.run.init_from == "llama"
    assert (read.run.steps, read.run.batch_tokens) == (3, 64)
    assert read.component("backbone") == lattice.from_pretrained("llama").components["backbone"]
    assert str(read.origin(("run", "batch_tokens"))).startswith("base.toml:")
    assert str(read.origin(("backbone", "hidden_size"))).startswith("deep/new.toml:")
    assert "lr" not in (here / "deep/new.toml").read_text(), "what base.toml says is not said again"


def test_a_model_of_ours_comes_with_its_recurrence(here):
    thinking = lattice.from_pretrained("gpt_neox", {"kind": "latent_thoughts", "thoughts": 2})
    lattice.save_pretrained(thinking, "thinking")
    export_tokenizer(BytesCodec(), here / "none", here / "thinking", 64)
    recipe = imported("thinking")
    assert recipe.component("recurrence") == thinking.recurrence
    ids = torch.arange(16)[None]
    model = training_graph(recipe, here / "run").model
    assert torch.equal(model(ids).logits, thinking(ids).logits)


# ── what does not fit ─────────────────────────────────────────────────────────────────────────────
def test_a_recipe_that_exists_is_kept(here):
    (here / "new.toml").write_text("# mine")
    with pytest.raises(FileExistsError, match=r"'new\.toml' exists"):
        imported()
    assert (here / "new.toml").read_text() == "# mine"


def test_weights_without_a_tokenizer(here):
    (here / "gpt_neox/tokenizer.json").unlink()
    with pytest.raises(
        lattice.RecipeError, match=r"'gpt_neox' has no tokenizer\.json.*--set tokenizer\.kind"
    ):
        imported()
    assert not (here / "new.toml").exists()
    chosen = imported(overrides=["tokenizer.kind=bytes"])
    assert chosen.component("tokenizer").kind == "bytes"


def test_a_tokenizer_with_more_tokens_than_the_weights_have_rows(here):
    made_by_transformers("gpt_neox", here / "small")
    change_config(here / "gpt_neox", vocab_size=200)
    weights = load_file("gpt_neox/model.safetensors")
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        weights[name] = weights[name][:200].clone()
    save_file(weights, "gpt_neox/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lattice.RecipeError, match="tokenizer: has 257 tokens, the weights 200 rows"):
        imported()


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.init_from=nowhere", "run.init_from = 'nowhere': no such directory"),
        ("run.init_from=deep", r"run.init_from = 'deep': deep/config\.json does not exist"),
        ("run.init_from=llama", "run.init_from = 'llama': its weights are of backbone.kind = 'llama'"),
        (
            "backbone.intermediate_size=48",
            r"run.init_from = 'gpt_neox': its weights do not fit the recipe's \[backbone\] and "
            r"\[recurrence\]: .*layers\.0\.mlp\.dense_h_to_4h\.weight is \(40, 24\), must be \(48, 24\)",
        ),
        ("backbone.num_hidden_layers=4", r"run.init_from.*gpt_neox\.layers\.3\.\S+ is missing"),
        ("backbone.num_hidden_layers=2", r"run.init_from.*gpt_neox\.layers\.2\.\S+ has no place"),
    ],
)
def test_weights_that_do_not_fit_are_found_before_anything_is_done(override, message, here):
    imported()
    (here / "deep").mkdir()
    with pytest.raises(lattice.RecipeError, match=message):
        lattice.train("new.toml", overrides=[override], out="run")
    assert not (here / "run").exists()


def test_a_damaged_file_is_named(here):
    imported()
    path = here / "gpt_neox/model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        lattice.RecipeError, match=r"run\.init_from = 'gpt_neox': gpt_neox/model\.safetensors: no valid"
    ):
        lattice.train("new.toml", out="run")


def test_other_architectures(here):
    change_config(here / "gpt_neox", model_type="gpt2")
    with pytest.raises(ValueError, match=r"model_type = 'gpt2': must be one of .*gpt_neox, llama"):
        imported()


def test_settings_that_shape_no_weight_are_noted(here, capsys):
    imported()
    training_graph(lattice.load_recipe("new.toml", ["backbone.rotary_emb_base=9.0"]), here / "run")
    note = "note: backbone.rotary_emb_base = 9.0 here, 500.0 in the weights' config.json"
    assert note in capsys.readouterr().out


def test_what_a_recipe_leaves_open_is_no_difference(here, capsys):
    imported("llama")
    text = (here / "new.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("head_dim", "num_key_value_heads"))]
    assert len(lines) == len(text.splitlines()) - 2
    (here / "new.toml").write_text("\n".join(lines))
    training_graph(lattice.load_recipe("new.toml"), here / "run")
    shown = capsys.readouterr().out
    assert "start from 'llama'" in shown
    assert "note:" not in shown


# ── the start of a run ────────────────────────────────────────────────────────────────────────────
def test_parameters_of_the_recurrence_are_newly_drawn_and_said(here, capsys):
    imported(overrides=["recurrence.kind=depth", "recurrence.inject=concat"])
    recipe = lattice.load_recipe("new.toml")
    model = training_graph(recipe, here / "run").model
    out = capsys.readouterr().out
    assert "newly drawn, because 'gpt_neox' has none: recurrence.adapter.weight" in out
    weights = load_file("gpt_neox/model.safetensors")
    used = {
        name: torch.equal(parameter, weights[name]) for name, parameter in model.decoder.named_parameters()
    }
    assert all(used.values())
    assert used.keys() == weights.keys()


def test_parameters_of_the_recurrence_are_read_where_they_are(here, capsys):
    table = {"kind": "depth", "inject": "concat"}
    deep = lattice.from_pretrained("gpt_neox", table)
    with torch.no_grad():
        deep.unroll.adapter.weight.normal_()
    lattice.save_pretrained(deep, "deep")
    export_tokenizer(BytesCodec(), here / "none", here / "deep", 64)
    model = training_graph(imported("deep"), here / "run").model
    assert torch.equal(model.unroll.adapter.weight, deep.unroll.adapter.weight)
    assert "newly drawn" not in capsys.readouterr().out
    with pytest.raises(lattice.RecipeError, match=r"recurrence\.adapter\.weight has no place"):
        imported("deep", to="other.toml", overrides=["recurrence.inject=add"])


def test_a_run_that_goes_on_reads_its_checkpoint_and_not_the_weights(here, capsys):
    imported(overrides=["optimizer.lr=1e-2"])
    lattice.train("new.toml", overrides=["run.steps=2"], out="run")
    before = state.weights(lattice.load("run"))
    shutil.rmtree("gpt_neox")
    capsys.readouterr()
    lattice.train("new.toml", overrides=["run.steps=3"], out="run")
    assert "the weights start from" not in capsys.readouterr().out
    after = state.weights(lattice.load("run"))
    changes = [float((after[name] - before[name]).abs().max()) for name in before]
    assert 0 < max(changes) < 0.05, "one step of training, from where the run was"


def test_half_precision_weights_become_float32(here):
    weights = {name: one.half() for name, one in load_file("gpt_neox/model.safetensors").items()}
    save_file(weights, "gpt_neox/model.safetensors", metadata={"format": "pt"})
    model = training_graph(imported(), here / "run").model
    for name, parameter in model.decoder.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name].float())
