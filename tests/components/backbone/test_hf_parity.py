"""Parity with the GPT-NeoX and Llama classes of the installed transformers, through files in both directions.

Every parameter is drawn far from its initial value, biases and norms too, so that none can be dropped,
swapped or transposed without the logits telling.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lattice

transformers = pytest.importorskip("transformers")

VOCABULARY = 47
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
}
GPT_NEOX = {
    "parallel_residual": {},
    "sequential_residual": {"use_parallel_residual": False},
    "rotary_half": {"rotary": 0.5},
    "rotary_all": {"rotary": 1.0},
    "rotary_base": {"theta": 500.0},
    "no_attention_bias": {"attention_bias": False},
    "gelu_new": {"hidden_act": "gelu_new"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "silu_sequential": {"hidden_act": "silu", "use_parallel_residual": False},
    "norm_eps": {"layer_norm_eps": 1e-1},
    "tied": {"tie_word_embeddings": True},
    "other_heads": {"num_attention_heads": 2, "rotary": 1 / 3},
}
LLAMA = {
    "as_many_kv_heads": {},
    "grouped_4_2": {"num_key_value_heads": 2},
    "grouped_4_1": {"num_key_value_heads": 1},
    "theta": {"theta": 500000.0},
    "attention_bias": {"attention_bias": True, "num_key_value_heads": 2},
    "mlp_bias": {"mlp_bias": True},
    "norm_eps": {"rms_norm_eps": 1e-1},
    "tied": {"tie_word_embeddings": True},
    "head_dim_wide": {"head_dim": 16, "num_key_value_heads": 2},
    "head_dim_narrow": {"head_dim": 2},
}
CASES = [("gpt_neox", name) for name in GPT_NEOX] + [("llama", name) for name in LLAMA]
FILES = pytest.mark.parametrize("shard_size", ["5GB", "8KB"], ids=["one_file", "sharded"])


def transformers_model(kind, name):
    if kind == "gpt_neox":
        options = {"num_attention_heads": 3, **COMMON, **GPT_NEOX[name]}
        rope = {"partial_rotary_factor": options.pop("rotary", 0.25)}
        made, config_of = transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig
    else:
        options = {"num_attention_heads": 4, **COMMON, **LLAMA[name]}
        rope = {}
        made, config_of = transformers.LlamaForCausalLM, transformers.LlamaConfig
    rope |= {"rope_type": "default", "rope_theta": options.pop("theta", 10000.0)}
    model = made(config_of(**options, rope_parameters=rope)).eval()
    randomise(model, f"{kind}/{name}")
    return model


@torch.no_grad()
def randomise(model, key):
    generator = torch.Generator().manual_seed(sum(key.encode()))
    for name, parameter in model.named_parameters():
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))


def some_ids(rows=3, length=9, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def saved_by_transformers(kind, name, folder, shard_size="5GB"):
    model = transformers_model(kind, name)
    model.save_pretrained(folder, max_shard_size=shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (shard_size != "5GB")
    return model


def assert_same_logits(ours, theirs, ids, mask=None):
    """On the real positions; transformers must be told the positions of a left-padded row."""
    if mask is None:
        reference = theirs(ids).logits
        real = torch.ones_like(ids, dtype=torch.bool)
    else:
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        reference = theirs(ids, attention_mask=mask, position_ids=position).logits
        real = mask.bool()
    with torch.no_grad():
        logits = ours(ids, attention_mask=mask).logits
    assert reference.std() > 0.1  # a comparison of constants would tell nothing
    torch.testing.assert_close(logits[real], reference[real], atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@FILES
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_weights_of_transformers_give_its_logits(kind, name, shard_size, tmp_path):
    theirs = saved_by_transformers(kind, name, tmp_path, shard_size)
    ours = lattice.from_pretrained(tmp_path)
    ids = some_ids()
    assert_same_logits(ours, theirs, ids)
    right = torch.ones_like(ids)
    right[1, 6:], right[2, 2:] = 0, 0
    assert_same_logits(ours, theirs, ids, right)
    left = right.flip(1)
    assert_same_logits(ours, theirs, ids, left)


@FILES
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_there_and_back(kind, name, shard_size, tmp_path):
    saved_by_transformers(kind, name, tmp_path / "theirs")
    ours = lattice.from_pretrained(tmp_path / "theirs")
    randomise(ours, "anew")
    lattice.save_pretrained(ours, tmp_path / "ours", max_shard_size=shard_size)
    assert (tmp_path / "ours/model.safetensors.index.json").exists() == (shard_size != "5GB")

    again = lattice.from_pretrained(tmp_path / "ours")
    assert again.components["backbone"] == ours.components["backbone"]
    before, after = ours.decoder.state_dict(), again.decoder.state_dict()
    assert before.keys() == after.keys()
    for parameter, value in before.items():
        assert torch.equal(after[parameter], value), parameter

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, theirs.eval(), some_ids(seed=1))


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_tied_head_stays_tied(kind, tmp_path):
    saved_by_transformers(kind, "tied", tmp_path)
    model = lattice.from_pretrained(tmp_path)
    assert model.decoder.head.weight is model.decoder.embedding.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in transformers_model(kind, "tied").parameters()
    )


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_tied_head_stays_tied_where_the_file_holds_both(kind, tmp_path):
    theirs = saved_by_transformers(kind, "tied", tmp_path)
    embedding, head = {
        "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
        "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    }[kind]
    weights = load_file(tmp_path / "model.safetensors")
    assert head not in weights
    weights[head] = weights[embedding].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = lattice.from_pretrained(tmp_path)
    assert model.decoder.head.weight is model.decoder.embedding.weight
    assert_same_logits(model, theirs, some_ids())


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_tied_head_of_which_the_file_holds_two_is_refused(kind, tmp_path):
    saved_by_transformers(kind, "tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = {"gpt_neox": "embed_out.weight", "llama": "lm_head.weight"}[kind]
    weights[head] = torch.randn(VOCABULARY, 24)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"embed_\w+\.weight and {head} are one tied weight"):
        lattice.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_an_untied_head_stays_untied(kind, tmp_path):
    saved_by_transformers(kind, next(name for backbone, name in CASES if backbone == kind), tmp_path)
    model = lattice.from_pretrained(tmp_path)
    assert not torch.equal(model.decoder.head.weight, model.decoder.embedding.weight)


def test_configurations_of_older_transformers(tmp_path):
    """Rotary settings at the top level, and buffers among the weights, as Pythia's directories have them."""
    theirs = saved_by_transformers("gpt_neox", "rotary_half", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rotary_pct": 0.5, "rotary_emb_base": 10000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_logits(lattice.from_pretrained(tmp_path), theirs, some_ids())


@pytest.mark.filterwarnings("ignore:.*multiplies the embeddings by:UserWarning")
def test_thoughts_on_loaded_weights_are_written_down(tmp_path):
    theirs = saved_by_transformers("llama", "grouped_4_2", tmp_path / "theirs")
    table = {"kind": "latent_thoughts", "thoughts": 2}
    thinking = lattice.from_pretrained(tmp_path / "theirs", table)
    logits = thinking(some_ids()).logits
    assert not torch.allclose(logits, theirs(some_ids()).logits, atol=1e-2)
    lattice.save_pretrained(thinking, tmp_path / "ours")
    again = lattice.from_pretrained(tmp_path / "ours")
    assert again.recurrence == thinking.recurrence
    assert torch.equal(again(some_ids()).logits, logits)
    plain = lattice.from_pretrained(tmp_path / "ours", {"kind": "none"})
    torch.testing.assert_close(plain(some_ids()).logits, theirs(some_ids()).logits)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    saved_by_transformers("llama", "grouped_4_2", folder)
    return folder


@pytest.fixture
def folder(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"copy/config\.json does not exist"):
        lattice.from_pretrained(folder)


def test_configuration_that_is_no_json(folder):
    (folder / "config.json").write_text('{\n "model_type": llama\n}')
    with pytest.raises(ValueError, match=r"copy/config\.json:2: no valid JSON"):
        lattice.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type = 'gpt2': must be one of .*gpt_neox, llama"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "type = 'linear'",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "type = 'dynamic'",
        ),
        # transformers prefers the older name, also where both are there
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "type = 'linear'"),
        ({"is_causal": False}, "is_causal = False: only causal"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads = 4: must be a multiple of num_key_value_heads",
        ),
        ({"hidden_size": "24"}, "'str' and 'int'"),
        ({"attention_bias": "yes"}, r"^[^ ]*/config\.json: backbone\.attention_bias = \"yes\""),
    ],
)
def test_configuration_that_is_not_implemented(folder, settings, message):
    change_config(folder, **settings)
    with pytest.raises(ValueError, match=message) as raised:
        lattice.from_pretrained(folder)
    assert "copy/config.json" in str(raised.value)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_the_number_of_heads_must_be_said(kind, tmp_path):
    """Not every shape tells it, and transformers would take a default of its own."""
    saved_by_transformers(kind, "tied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: num_attention_heads: missing"):
        lattice.from_pretrained(tmp_path)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"copy/model\.safetensors does not exist"):
        lattice.from_pretrained(folder)


def test_missing_tensor(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ValueError, match=r"copy: .*model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        lattice.from_pretrained(folder)


def test_missing_head_of_an_untied_model(folder):
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"copy: .*lm_head\.weight is missing"):
        lattice.from_pretrained(folder)


def test_unknown_tensor(folder):
    change_weights(folder, lambda weights: weights.update(extra=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"copy: .*extra has no place"):
        lattice.from_pretrained(folder)


def test_wrong_shape(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(25)}))
    with pytest.raises(ValueError, match=r"copy: .*model\.norm\.weight is \(25,\), must be \(24,\)"):
        lattice.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -50])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"copy/model\.safetensors: no valid safetensors file"):
        lattice.from_pretrained(folder)


def test_one_file_beside_the_index_of_an_earlier_save(tmp_path):
    theirs = saved_by_transformers("llama", "grouped_4_1", tmp_path, "8KB")
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists(), "its shards are gone"
    assert_same_logits(lattice.from_pretrained(tmp_path), theirs, some_ids())


def test_shards_that_are_damaged(tmp_path):
    saved_by_transformers("llama", "theta", tmp_path, "8KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(shards) > 2
    whole = (tmp_path / shards[1]).read_bytes()
    (tmp_path / shards[1]).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=f"{shards[1]}: no valid safetensors file"):
        lattice.from_pretrained(tmp_path)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1]} does not exist"):
        lattice.from_pretrained(tmp_path)
    for damaged in ('{"weight_map": ', "{}"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            lattice.from_pretrained(tmp_path)
