"""float8 by torchao, emulated: what it converts and refuses, and that it computes nearly what bf16 does."""

import sys

import pytest
import torch
from torch import nn

import lattice
from lattice.components.compile.block import CompileBlock
from lattice.components.precision.float8 import Float8
from lattice.components.precision.formats import BFloat16
from lattice.draws import Draw
from lattice.split import Split
from tests.built_in import built_in

VOCABULARY = 97
CPU = torch.device("cpu")
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 4},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
LINEARS = {
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "llama": (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
}
LAYERS = {"gpt_neox": "decoder.gpt_neox.layers", "llama": "decoder.model.layers"}
THINKING = {"kind": "latent_thoughts", "thoughts": 1}
RECURRENCES = {kind: {"kind": kind} for kind in sorted(built_in("recurrence"))} | {
    "two_thoughts_swept": {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel"}
}
CHECKPOINTING = {
    "block": {"kind": "block"},
    "selective": {"kind": "selective"},
    "pass": {"kind": "pass"},
    "pass_blocks": {"kind": "pass", "blocks": True},
}
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))


@pytest.fixture
def torchao():
    pytest.importorskip("torchao.float8")


def tiny(backbone="gpt_neox", recurrence=THINKING, *, hidden=32, inner=64, layers=3, **tables):
    options = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    options |= {**BACKBONES[backbone], "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return lattice.build_model({"backbone": options, "recurrence": recurrence, **tables})


def float8(**options):
    return Float8(**{"emulate": True, "min_features": 16, **options})


def some_ids(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def computed(model, precision, draw=None):
    """Logits, loss and gradients of a model that is converted here."""
    ids, targets = some_ids(2, 16), some_ids(2, 16, seed=1)
    precision.apply(model)
    with precision.autocast(CPU):
        output = model(ids, targets=targets, draw=draw)
        with torch.no_grad():
            logits = model(ids).logits.float()
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits, output.loss.item(), gradients


def difference(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def converted(model):
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


# ── what is converted ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("torchao")
@both_backbones
def test_the_linears_of_the_layers_and_no_others(backbone, capsys):
    model = tiny(backbone)
    tensors = dict(model.named_parameters())
    float8().apply(model)
    assert converted(model) == {
        f"{LAYERS[backbone]}.{layer}.{name}" for layer in range(3) for name in LINEARS[backbone]
    }
    after = dict(model.named_parameters())
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensor and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    count = 3 * len(LINEARS[backbone])
    said = f"float8 (rowwise, emulated): {count} of {count + 1} linears; left in bfloat16: 1 head\n"
    assert capsys.readouterr().out == said


@pytest.mark.usefixtures("torchao")
def test_what_is_left_is_counted_by_reason(capsys):
    model = tiny(
        "llama", inner=72, layers=2
    )  # the MLP is no multiple of 16; keys and values have 16 features
    float8(min_features=32).apply(model)
    assert {name.rsplit(".", 1)[1] for name in converted(model)} == {"q_proj", "o_proj"}
    said = "4 of 15 linears; left in bfloat16: 6 not multiples of 16, 4 too small, 1 head"
    assert said in capsys.readouterr().out


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_what_is_large_enough_is_what_torchao_says(recipe):
    from torchao.float8 import _auto_filter_for_recipe

    large = _auto_filter_for_recipe(recipe, [])
    sizes = (16, 512, 1024, 1040, 2048, 2064, 4096, 4112, 8192)
    with torch.device("meta"):
        shapes = [nn.Linear(inputs, outputs) for inputs in sizes for outputs in sizes]
    chosen = [Float8(recipe=recipe)._large(one.in_features, one.out_features) for one in shapes]
    assert chosen == [large(one, "layer") for one in shapes]


# ── what is refused ───────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("hidden", "options", "why"),
    [
        (32, {"min_features": None}, "12 too small, 1 head"),
        (32, {"min_features": 65}, "12 too small, 1 head"),
        (40, {"inner": 72}, "12 not multiples of 16, 1 head"),
    ],
)
def test_nothing_to_convert(hidden, options, why):
    inner = options.pop("inner", 64)
    with pytest.raises(ValueError, match=rf"none of 13 linears can be converted \({why}\).*kind = \"bf16\""):
        float8(**options).apply(tiny(hidden=hidden, inner=inner))


@pytest.mark.parametrize(
    ("recipe", "capability", "refused"),
    [
        ("rowwise", (8, 9), "compute capability 9.0 or later, Some GPU has compute capability 8.9"),
        ("tensorwise", (8, 6), "compute capability 8.9 or later, Some GPU has compute capability 8.6"),
        ("tensorwise", (8, 9), None),
        ("rowwise_with_gw_hp", (9, 0), None),
    ],
)
def test_gpus_by_compute_capability(recipe, capability, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    precision, device = Float8(recipe=recipe), torch.device("cuda")
    if refused is None:
        precision._check(device)
    else:
        with pytest.raises(ValueError, match=f"{refused}: set precision.emulate = true"):
            precision._check(device)


def test_a_cpu_without_emulation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = (
        r"precision\.emulate = false: .* needs a CUDA device .* the device is 'cpu': set .*emulate = true"
    )
    with pytest.raises(ValueError, match=refused):
        Float8().apply(tiny())
    with pytest.raises(ValueError, match=refused):
        Float8().autocast(CPU)


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"needs torchao .*: pip install 'lattice\[float8\]'"):
        float8().apply(tiny())


def test_impossible_options():
    for table, message in (
        ({"min_features": 0}, r"precision\.min_features = 0: must be at least 1"),
        ({"recipe": "columnwise"}, r"precision\.recipe = \"columnwise\""),
    ):
        with pytest.raises(lattice.RecipeError, match=message):
            lattice.load_recipe({"precision": {"kind": "float8", **table}})


@pytest.mark.usefixtures("torchao")
def test_tokens_that_are_no_multiple_of_16():
    """On a GPU the product that gives a weight's gradient would be refused deep in the backward pass."""
    model, exact = tiny(), tiny()
    float8().apply(model)
    float8(recipe="rowwise_with_gw_hp").apply(exact)
    with float8().autocast(CPU):
        with pytest.raises(
            ValueError, match=r"a batch of 2 x 12 tokens: .* multiples of 16 .*run\.micro_batch"
        ):
            model(some_ids(2, 12))
        exact(some_ids(2, 12), targets=some_ids(2, 12)).loss.backward()
        model.split = Split(None, rank=0, size=4)  # whose ranks have 8 tokens each
        with pytest.raises(ValueError, match=r"a batch of 2 x 16 / 4 tokens"):
            model(some_ids(2, 16))
        model.split = None
        with torch.no_grad():
            model(some_ids(2, 12))  # evaluation and decoding take any number


# ── what it computes ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("torchao")
@both_backbones
@pytest.mark.parametrize("recipe", RECIPES)
def test_close_to_bf16(backbone, recipe):
    logits, loss, gradients = computed(tiny(backbone, hidden=64, inner=128), BFloat16())
    rounded = computed(tiny(backbone, hidden=64, inner=128), float8(recipe=recipe))
    assert 1e-3 < difference(rounded[0], logits) < 0.05
    assert rounded[1] == pytest.approx(loss, rel=1e-2)
    for name, gradient in gradients.items():
        assert rounded[2][name].dtype == torch.float32
        assert difference(rounded[2][name], gradient) < 0.15, name


@pytest.mark.usefixtures("torchao")
def test_gradients_of_weights_in_high_precision_are_more_exact():
    reference = computed(tiny(recurrence={"kind": "none"}, layers=1), BFloat16())[2]
    name = "decoder.gpt_neox.layers.0.mlp.dense_4h_to_h.weight"  # nothing but the head comes after it
    error = {
        recipe: difference(
            computed(tiny(recurrence={"kind": "none"}, layers=1), float8(recipe=recipe))[2][name],
            reference[name],
        )
        for recipe in RECIPES
    }
    assert error["rowwise_with_gw_hp"] < 0.8 * min(error["rowwise"], error["tensorwise"])


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", RECIPES)
def test_whether_a_token_is_rounded_by_itself(recipe):
    """One scale for all rows lets a later token change what comes before it; a scale for each does not."""
    model = tiny(recurrence={"kind": "none"})
    with torch.no_grad():
        model.decoder.embedding.weight[0, 0] = 100  # after the norm larger than any other input
        float8(recipe=recipe).apply(model)
        ids = some_ids(1, 16).clamp(min=1)
        other = ids.clone()
        other[0, -1] = 0
        with float8().autocast(CPU):
            same = torch.equal(model(ids).logits[:, :-1], model(other).logits[:, :-1])
    assert same == (recipe != "tensorwise")


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("backbone", "recurrence"), [*(("gpt_neox", kind) for kind in RECURRENCES), ("llama", "latent_thoughts")]
)
def test_recomputation_changes_no_gradient(backbone, recurrence):
    def run(**tables):
        model = tiny(backbone, RECURRENCES[recurrence], layers=4, **tables)
        return computed(model, float8(), Draw(0, 1))

    _, loss, gradients = run()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    for table in CHECKPOINTING.values():
        _, again, recomputed = run(activation_checkpoint=table)
        assert again == loss
        for name, gradient in gradients.items():
            assert torch.equal(recomputed[name], gradient), name


@pytest.mark.usefixtures("torchao")
def test_compiled_blocks():
    """Traced in one graph; the operations are the same, so that nothing rounds otherwise."""
    _, loss, gradients = computed(tiny(recurrence={"kind": "none"}, layers=2), float8())
    model = tiny(recurrence={"kind": "none"}, layers=2)
    CompileBlock(fullgraph=True, backend="aot_eager").apply(model)
    _, again, compiled = computed(model, float8())
    assert again == pytest.approx(loss, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-6, rtol=1e-4)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────
RUN = {
    "run": {"steps": 30, "sequence_tokens": 32, "batch_tokens": 128, "device": "cpu"},
    "backbone": {
        **BACKBONES["gpt_neox"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 272,
        "max_position_embeddings": 64,
    },
    "recurrence": THINKING,
    "optimizer": {"kind": "adamw", "lr": 1e-2},
    "evaluators": {"validation": {"kind": "perplexity", "max_tokens": 256}},
}
FLOAT8 = {"kind": "float8", "emulate": True, "min_features": 16}


@pytest.mark.usefixtures("torchao")
def test_a_run_learns_as_bf16_does_and_loads_as_any_other(tmp_path, monkeypatch):
    summary = {
        kind: lattice.train({**RUN, "precision": table}, out=tmp_path / kind)
        for kind, table in (("bf16", {"kind": "bf16"}), ("float8", FLOAT8))
    }
    loss = {kind: one["validation_loss"] for kind, one in summary.items()}
    assert loss["float8"] < 4.5  # 5.6 at the start
    assert loss["float8"] == pytest.approx(loss["bf16"], rel=0.03)

    monkeypatch.setitem(sys.modules, "torchao.float8", None)  # the model that comes back has no need of it
    model = lattice.load(tmp_path / "float8")
    assert not converted(model)
    assert lattice.generate(model, some_ids(1, 5), 4).shape == (1, 9)
    lattice.save_pretrained(model, tmp_path / "hf")
    again = lattice.from_pretrained(tmp_path / "hf")
    assert torch.equal(again(some_ids(2, 9)).logits, model(some_ids(2, 9)).logits)


@pytest.mark.usefixtures("torchao")
def test_a_checkpoint_goes_on_in_another_precision():
    model, plain = tiny(), tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    float8().apply(model)
    assert plain.load_state_dict(model.state_dict()).missing_keys == []
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert model.load_state_dict(tiny().state_dict()).unexpected_keys == []
