"""Models of ours in transformers: the same logits and tokens, from a directory that stands on its own."""

import copy
import json
import shutil
import subprocess
import sys
import textwrap

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import lattice
from lattice import registry
from lattice.hf import init_from
from tests.built_in import built_in

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "rotary_pct": 0.5, **SIZES},
    "llama_tied": {"kind": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, **SIZES},
}
RECURRENCES = {kind: {"kind": kind} for kind in sorted(built_in("recurrence") - {"none"})} | {
    "two_thoughts": {"kind": "latent_thoughts", "thoughts": 2},
    "depth_with_parameters": {"kind": "depth", "inject": "concat"},
}
USER_FILE = '''
"""Adds a learned vector and a fixed one to every token."""
from dataclasses import dataclass
import torch
from torch import nn
import lattice
from lattice.protocols import Pass, Recurrence, Unrolled

@lattice.register("recurrence", "shifted")
@dataclass(frozen=True, kw_only=True)
class Shifted(Recurrence):
    """A shift."""
    def passes(self, shape, *, training):
        return [Pass()]
    def build(self, shape):
        return Shift(shape.hidden_size)

class Shift(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.learned = nn.Parameter(torch.randn(size))
        self.register_buffer("fixed", torch.linspace(-1, 1, size), persistent=False)
    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        slots = stack.embed(ids_BL) + self.learned + self.fixed
        return Unrolled(stack.run(slots.unsqueeze(2), cache=cache).squeeze(2))
    def step(self, stack, ids_B1, cache):
        return self(stack, ids_B1, cache=cache).hidden_BLD
'''
USER_BACKBONES = '''
"""Backbones that build upon Llama."""
from dataclasses import dataclass
import torch
import lattice
from lattice.components.backbone.llama import Llama, LlamaDecoder
from lattice.decoder import Rotary
from lattice.protocols import Backbone

@lattice.register("backbone", "bare")
@dataclass(frozen=True, kw_only=True)
class Bare(Llama):
    """Without positions. What names it Llama in transformers is inherited."""
    def build(self):
        return Unplaced(self)

class Unplaced(LlamaDecoder):
    def rotary(self, position_BS, dtype):
        cos, sin = super().rotary(position_BS, dtype)
        return Rotary(torch.ones_like(cos), torch.zeros_like(sin))

@lattice.register("backbone", "slim")
@dataclass(frozen=True, kw_only=True)
class Slim(Backbone):
    """With options of its own. Nothing is said of transformers."""
    width: int = 32
    @property
    def whole(self):
        return Llama(hidden_size=self.width, num_hidden_layers=3, num_attention_heads=4,
                     intermediate_size=40, vocab_size=61, max_position_embeddings=64)
    @property
    def shape(self):
        return self.whole.shape
    @property
    def layer_cost(self):
        return self.whole.layer_cost
    def build(self):
        return self.whole.build()
'''


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """transformers copies the code of a directory to a cache: not to the user's."""

    def forget():
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]

    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        forget()
        yield folder
        forget()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def randomised(backbone, recurrence=None, **tables):
    """Weights far from their start, norms and biases too, so that none can be lost unnoticed."""
    recurrence = {} if recurrence is None else {"recurrence": recurrence}
    table = backbone if isinstance(backbone, dict) else BACKBONES[backbone]
    model = lattice.build_model({"backbone": table, **recurrence, **tables}).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def loaded(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def some_ids(rows=3, length=9, seed=0):
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :1] = 0, 0
    return mask


def greedy(model, ids, mask=None, new=6, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


# ── the same function ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_and_greedy_tokens_are_ours(backbone, recurrence, tmp_path):
    ours = randomised(backbone, RECURRENCES[recurrence])
    lattice.save_pretrained(ours, tmp_path)
    theirs = loaded(tmp_path)
    ids = some_ids()
    mask = left_padded(ids)
    for here in (None, mask, mask.flip(1)):
        torch.testing.assert_close(theirs(ids, attention_mask=here).logits, ours(ids, here).logits)
    assert torch.equal(greedy(theirs, ids), lattice.generate(ours, ids, 6))
    padded = greedy(theirs, ids, mask)
    assert torch.equal(padded, lattice.generate(ours, ids, 6, attention_mask=mask))
    alone = greedy(theirs, ids[1:2, 4:])
    assert torch.equal(padded[1:2, 4:], alone)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_plain_model_is_one_of_transformers(backbone, tmp_path):
    ours = randomised(backbone)
    lattice.save_pretrained(ours, tmp_path)
    assert not list(tmp_path.glob("*.py"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__module__.startswith("transformers.")
    torch.testing.assert_close(theirs(some_ids()).logits, ours(some_ids()).logits, atol=1e-5, rtol=0)


def test_a_mask_that_hides_something_is_not_plain(tmp_path):
    ours = randomised("gpt_neox", mask={"kind": "causal", "window": 3})
    lattice.save_pretrained(ours, tmp_path / "windowed")
    torch.testing.assert_close(loaded(tmp_path / "windowed")(some_ids()).logits, ours(some_ids()).logits)
    everything = randomised("gpt_neox", mask={"kind": "causal", "window": 64})
    lattice.save_pretrained(everything, tmp_path / "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text())["model_type"] == "gpt_neox"


@pytest.mark.parametrize("recurrence", [None, {"kind": "latent_thoughts"}])
def test_only_the_token_that_was_given_ends_a_text(recurrence, tmp_path):
    """GPT-NeoX has one of its own in transformers, 2."""

    def generated(token):
        theirs = loaded(tmp_path)
        others = [other for other in range(61) if other != token]
        return greedy(theirs, some_ids(), suppress_tokens=others).shape[1] - 9, theirs.config

    lattice.save_pretrained(randomised("gpt_neox", recurrence), tmp_path)
    new, config = generated(2)
    assert (new, config.bos_token_id, config.eos_token_id) == (6, None, None)
    lattice.save_pretrained(randomised("gpt_neox", recurrence), tmp_path, eos_id=5)
    assert generated(2)[0] == 6
    new, config = generated(5)
    assert (new, config.bos_token_id, config.eos_token_id) == (1, None, 5)


def test_without_trust_nothing_is_computed(tmp_path):
    lattice.save_pretrained(randomised("gpt_neox", {"kind": "latent_thoughts"}), tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model with two thoughts a token, and its directory."""
    folder = tmp_path_factory.mktemp("pair")
    with torch.no_grad():
        ours = randomised("gpt_neox", {"kind": "latent_thoughts", "thoughts": 2})
    lattice.save_pretrained(ours, folder)
    return ours, folder


# ── forward ───────────────────────────────────────────────────────────────────────────────────────
def test_labels_give_the_mean_loss_of_the_next_tokens(pair):
    ours, theirs = pair[0], loaded(pair[1])
    ids = some_ids()
    labels = ids.clone()
    labels[0, :5] = -100
    output = theirs(ids, labels=labels)
    expected = F.cross_entropy(ours(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    loss, logits = theirs(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_gradients_reach_every_parameter(pair):
    theirs = loaded(pair[1])
    with torch.enable_grad():
        theirs(some_ids(), labels=some_ids()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in theirs.parameters())


def test_a_part_that_is_replaced_is_computed(pair, tmp_path):
    theirs, ids = loaded(pair[1]), some_ids()
    plain, linear = theirs(ids).logits, torch.nn.Linear(32, 61, bias=False)
    linear.weight.copy_(2 * theirs.embed_out.weight)
    by_hand, quantized = copy.deepcopy(theirs), copy.deepcopy(theirs)
    by_hand.embed_out = linear
    quantized._modules["embed_out"] = linear  # as torch.ao.quantization.convert does
    for model in (by_hand, quantized):
        assert model.get_output_embeddings() is linear
        torch.testing.assert_close(model(ids).logits, 2 * plain)
    torch.testing.assert_close(theirs(ids).logits, plain)
    lattice.save_pretrained(randomised("gpt_neox", RECURRENCES["depth_with_parameters"]), tmp_path)
    other = loaded(tmp_path)
    other.recurrence = torch.nn.Identity()
    assert other._model.unroll is other.recurrence


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_mask_of_other_tokens_is_refused(use_cache, pair):
    """It covers the tokens, and those in the cache if there are any."""
    theirs, ids = loaded(pair[1]), some_ids()
    for length in (6, 10, 12):
        with pytest.raises(ValueError, match=rf"attention_mask: has shape \(3, {length}\); must be \(3, 9\)"):
            theirs(ids, attention_mask=torch.ones(3, length, dtype=torch.long), use_cache=use_cache)
    first = theirs(ids[:, :6], use_cache=True)
    with pytest.raises(ValueError, match=r"has shape \(3, 8\); must be \(3, 3\) or \(3, 9\)"):
        theirs(ids[:, 6:], attention_mask=torch.ones(3, 8), past_key_values=first.past_key_values)


def test_logits_to_keep(pair):
    theirs, ids = loaded(pair[1]), some_ids()
    logits = theirs(ids).logits
    assert torch.equal(theirs(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert torch.equal(theirs(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


@pytest.mark.parametrize("padding", [False, True])
def test_with_a_cache_thoughts_are_sequential_however_the_text_is_cut(padding, pair):
    ours, theirs = pair[0], loaded(pair[1])
    ids = some_ids()
    mask = left_padded(ids) if padding else None
    cache = ours.cache()
    steps = [
        ours.step(ids[:, t : t + 1], cache, None if mask is None else mask[:, t : t + 1]) for t in range(9)
    ]
    expected = torch.stack(steps, dim=1)
    torch.testing.assert_close(theirs(ids, attention_mask=mask, use_cache=True).logits, expected)
    first = theirs(
        ids[:, :6], attention_mask=None if mask is None else mask[:, :6], use_cache=True, logits_to_keep=1
    )
    assert first.past_key_values.get_seq_length() == 6
    second = theirs(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected[:, 5:])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": torch.arange(9)[None]}, "position_ids"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values.*DynamicCache"),
    ],
)
def test_what_the_model_does_not_take_is_refused(inputs, message, pair):
    with pytest.raises(ValueError, match=message):
        loaded(pair[1])(some_ids(), **inputs)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_number_of_tokens_stays(backbone, tmp_path):
    lattice.save_pretrained(randomised(backbone, {"kind": "latent_thoughts"}), tmp_path)
    theirs, ids = loaded(tmp_path), some_ids()
    logits = theirs(ids).logits
    for wanted in ({}, {"new_num_tokens": 61}, {"new_num_tokens": 60, "pad_to_multiple_of": 61}):
        assert theirs.resize_token_embeddings(**wanted) is theirs.get_input_embeddings()
    for wanted in ({"new_num_tokens": 64}, {"pad_to_multiple_of": 32}):
        with pytest.raises(NotImplementedError, match="64 tokens: their number is fixed at 61"):
            theirs.resize_token_embeddings(**wanted)
    assert torch.equal(theirs(ids).logits, logits)


# ── generate ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("padding", [False, True])
def test_going_on_from_the_cache_of_a_generation(padding, pair):
    theirs, ids = loaded(pair[1]), some_ids()
    mask = left_padded(ids) if padding else torch.ones_like(ids)
    first = greedy(theirs, ids, mask, new=3, return_dict_in_generate=True)
    name = "cache" if "cache" in first else "past_key_values"  # before transformers 5.24
    covering = F.pad(mask, (0, 3), value=1)
    second = greedy(theirs, first.sequences, covering, new=3, **{name: first[name]})
    assert torch.equal(second, greedy(theirs, ids, mask))


def test_sampling(pair):
    theirs, ids = loaded(pair[1]), some_ids()
    mask = left_padded(ids)
    torch.manual_seed(0)
    one = greedy(theirs, ids, mask, do_sample=True, temperature=3.0, top_k=None)
    other = greedy(theirs, ids, mask, do_sample=True, temperature=3.0, top_k=None)
    assert one.shape == (3, 15)
    assert not torch.equal(one, other)
    assert torch.equal(greedy(theirs, ids, mask, do_sample=True, top_k=1), greedy(theirs, ids, mask))


@pytest.mark.parametrize("inputs", [{"position_ids": torch.arange(9)[None]}, {"output_hidden_states": True}])
def test_generating_refuses_what_a_forward_does(inputs, pair):
    with pytest.raises(ValueError, match=next(iter(inputs))):
        greedy(loaded(pair[1]), some_ids(), return_dict_in_generate=True, **inputs)


def test_without_a_cache_the_solver_computes_the_thoughts(tmp_path):
    converged = {"kind": "latent_thoughts", "jacobi": {"eval": 20}}  # K (L - 1) refinements: exact
    lattice.save_pretrained(randomised("gpt_neox", converged), tmp_path)
    theirs, ids = loaded(tmp_path), some_ids()
    mask = left_padded(ids)
    assert torch.equal(greedy(theirs, ids, mask, use_cache=False), greedy(theirs, ids, mask))


def test_the_prompt_in_parallel_if_asked_for(pair):
    ours, ids = pair[0], some_ids()
    config = AutoConfig.from_pretrained(pair[1], trust_remote_code=True)
    config.parallel_prefill = True
    theirs = loaded(pair[1], config=config)
    assert torch.equal(greedy(theirs, ids), lattice.generate(ours, ids, 6, parallel_prefill=True))
    solved = theirs(ids, use_cache=True, logits_to_keep=1).logits[:, 0]
    torch.testing.assert_close(solved, ours(ids).logits[:, -1])


def test_texts_end_and_beams_are_refused(pair):
    theirs, ids = loaded(pair[1]), some_ids()
    free = greedy(theirs, ids, new=12)
    end = int(free[0, 10])
    assert torch.equal(greedy(theirs, ids, new=12, eos_token_id=end, pad_token_id=end)[:, :10], free[:, :10])
    stopped = lattice.generate(pair[0], ids, 12, eos_id=end)
    assert torch.equal(greedy(theirs, ids, new=12, eos_token_id=end, pad_token_id=end), stopped)
    with pytest.raises(ValueError, match="cannot be reordered; set use_cache=False"):
        greedy(theirs, ids, num_beams=2)
    assert greedy(theirs, ids, num_beams=2, use_cache=False).shape == (3, 15)
    with pytest.raises(ValueError, match="stateful"):
        greedy(theirs, ids[:1], prompt_lookup_num_tokens=2)


# ── directories ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("recurrence", ["two_thoughts", "depth_with_parameters"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_saved_again_by_transformers(backbone, recurrence, tmp_path):
    ours = randomised(backbone, RECURRENCES[recurrence])
    lattice.save_pretrained(ours, tmp_path / "ours", max_shard_size="8KB")
    theirs = loaded(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.rmtree(tmp_path / "ours")
    expected = ours(some_ids()).logits
    torch.testing.assert_close(loaded(tmp_path / "theirs")(some_ids()).logits, expected)
    again = lattice.from_pretrained(tmp_path / "theirs")
    assert again.components == ours.components
    assert torch.equal(again(some_ids()).logits, expected)


def test_parameters_have_the_names_of_hugging_face(tmp_path):
    lattice.save_pretrained(randomised("llama_tied", RECURRENCES["depth_with_parameters"]), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert names - {"recurrence.adapter.weight"} == {name for name, _ in plain.named_parameters()}
    assert "recurrence.adapter.weight" in names


def test_other_thoughts_than_the_directory_says(pair):
    ours, folder = pair
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.hidden_size, config.vocab_size) == (32, 61)
    config.recurrence["thoughts"] = 1
    one = lattice.from_pretrained(folder, {"kind": "latent_thoughts", "thoughts": 1})
    logits = loaded(folder, config=config)(some_ids()).logits
    torch.testing.assert_close(logits, one(some_ids()).logits)
    assert not torch.allclose(logits, ours(some_ids()).logits, atol=1e-3)


def test_other_options_of_the_backbone_than_the_directory_says(pair, tmp_path):
    ours, folder = pair
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, max_position_embeddings=80)
    config.layer_norm_eps = 0.5
    assert (config.max_position_embeddings, config.layer_norm_eps) == (80, 0.5)
    backbone = {**BACKBONES["gpt_neox"], "max_position_embeddings": 80, "layer_norm_eps": 0.5}
    expected = lattice.from_pretrained(folder, overrides={"backbone": backbone})
    theirs = loaded(folder, config=config)
    torch.testing.assert_close(theirs(some_ids()).logits, expected(some_ids()).logits)
    assert not torch.allclose(theirs(some_ids()).logits, ours(some_ids()).logits, atol=1e-3)
    theirs.save_pretrained(tmp_path)
    assert lattice.from_pretrained(tmp_path).components == expected.components


def test_a_recurrence_that_the_directory_lacks_is_newly_drawn(tmp_path):
    lattice.save_pretrained(randomised("gpt_neox", {"kind": "depth"}), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    config.recurrence["inject"] = "concat"
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, trust_remote_code=True, output_loading_info=True
    )
    assert list(report["missing_keys"]) == ["recurrence.adapter.weight"]
    assert torch.equal(theirs.recurrence.adapter.weight, torch.eye(32).repeat(1, 2))  # begins as a sum
    torch.testing.assert_close(
        theirs(some_ids()).logits, lattice.from_pretrained(tmp_path)(some_ids()).logits
    )


def test_weights_of_the_backbone_must_all_be_there(tmp_path):
    lattice.save_pretrained(randomised("gpt_neox", {"kind": "loop"}), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["gpt_neox.layers.1.attention.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gpt_neox\.layers\.1\.attention\.dense are missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_new_model_from_the_configuration_alone(pair):
    config = AutoConfig.from_pretrained(pair[1], trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    drawn = lattice.build_model({"backbone": BACKBONES["gpt_neox"], "recurrence": config.recurrence})
    for name, parameter in drawn.decoder.named_parameters():
        assert torch.equal(model.state_dict()[name], parameter), name


def test_spread_over_several_gpus_a_layer_stays_whole(pair):
    theirs = loaded(pair[1])
    size = sum(4 * parameter.numel() for parameter in theirs.parameters())
    places = accelerate.infer_auto_device_map(
        theirs,
        max_memory={0: 0.7 * size, 1: size, "cpu": size},
        no_split_module_classes=theirs._no_split_modules,
    )
    layers = [name for name in places if name.startswith("gpt_neox.layers.")]
    assert layers == [f"gpt_neox.layers.{index}" for index in range(3)]
    assert {places[layer] for layer in layers} == {0, 1}


# ── a user's own recurrence ───────────────────────────────────────────────────────────────────────
@pytest.fixture
def own(tmp_path, monkeypatch):
    """A model of a user's own kind, saved; the file it came from is gone."""
    monkeypatch.setitem(registry._kinds, "recurrence", registry.kinds("recurrence"))
    source = tmp_path / "my-variant.py"
    source.write_text(textwrap.dedent(USER_FILE))
    recipe = {"imports": [str(source)], "backbone": BACKBONES["gpt_neox"], "recurrence": {"kind": "shifted"}}
    model = lattice.build_model(recipe).eval()
    lattice.save_pretrained(model, tmp_path / "hf")
    source.unlink()
    return model, tmp_path / "hf"


def test_a_users_file_goes_along(own, tmp_path, modules):
    ours, folder = own
    assert (folder / "my_variant.py").is_file()
    torch.save(ours(some_ids()).logits, tmp_path / "expected.pt")
    code = f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
        ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model(ids).logits, torch.load({str(tmp_path / "expected.pt")!r}))
        assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape == (3, 12)
        model.save_pretrained({str(tmp_path / "again")!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PATH": "", "HF_MODULES_CACHE": modules},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=r"imports code \(.*my_variant\.py\)"):
        lattice.from_pretrained(tmp_path / "again")


def test_a_users_file_imported_from_two_places_is_one(own):
    ours, folder = own
    theirs = loaded(folder)
    torch.testing.assert_close(theirs(some_ids()).logits, ours(some_ids()).logits)
    again = lattice.from_pretrained(folder, trust_imports=True)
    torch.testing.assert_close(again(some_ids()).logits, ours(some_ids()).logits)
    changed = folder.parent / "changed.py"
    changed.write_text((folder / "my_variant.py").read_text() + "\n# not the same\n")
    with pytest.raises(lattice.RecipeError, match="kind 'shifted' of role 'recurrence' is already"):
        lattice.load_recipe({"imports": [str(changed)]})


def test_a_class_that_no_file_holds_cannot_go_along(own, tmp_path, monkeypatch):
    ours, _ = own
    monkeypatch.setattr(type(ours.recurrence), "__module__", "__main__")
    with pytest.raises(ValueError, match=r"recurrence\.kind = 'shifted': is defined in __main__.*`imports`"):
        lattice.save_pretrained(ours, tmp_path / "elsewhere")


def test_a_directory_may_not_name_code_outside_itself(own):
    _, folder = own
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"imports": ["../evil.py"]}))
    with pytest.raises(ValueError, match=r"'\.\./evil\.py' must be a file of the directory itself"):
        lattice.from_pretrained(folder, trust_imports=True)


# ── a user's own backbone ─────────────────────────────────────────────────────────────────────────
@pytest.fixture
def backbones(tmp_path, monkeypatch):
    """The file of a user's own backbones."""
    monkeypatch.setitem(registry._kinds, "backbone", registry.kinds("backbone"))
    (tmp_path / "mine.py").write_text(USER_BACKBONES)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("table", [{"kind": "bare", **SIZES}, {"kind": "slim"}], ids=["bare", "slim"])
def test_a_users_backbone_is_no_architecture_of_transformers(table, backbones, tmp_path):
    ours = randomised(table, imports=[str(backbones)])
    lattice.save_pretrained(ours, tmp_path / "hf")
    assert (tmp_path / "hf/mine.py").is_file()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    ids = some_ids()
    theirs = loaded(tmp_path / "hf")
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    assert torch.equal(greedy(theirs, ids), lattice.generate(ours, ids, 6))
    again = lattice.from_pretrained(tmp_path / "hf", trust_imports=True)
    assert again.components["backbone"].kind == table["kind"]
    torch.testing.assert_close(again(ids).logits, ours(ids).logits)


def test_a_users_backbone_takes_no_directory_from_what_it_inherits(backbones, tmp_path):
    plain = randomised("llama_tied")
    lattice.save_pretrained(plain, tmp_path / "hf")
    registry.import_user_code(str(backbones), tmp_path)
    again = lattice.from_pretrained(tmp_path / "hf")
    assert again.components["backbone"].kind == "llama"
    torch.testing.assert_close(again(some_ids()).logits, plain(some_ids()).logits)
    recipe = {
        "imports": [str(backbones)],
        "run": {"init_from": str(tmp_path / "hf")},
        "backbone": BACKBONES["llama_tied"],
    }
    assert init_from.problems(lattice.load_recipe(recipe)) == []


def test_an_architecture_is_read_by_one_kind(backbones, tmp_path, monkeypatch):
    plain = randomised("llama_tied")
    lattice.save_pretrained(plain, tmp_path / "hf")
    registry.import_user_code(str(backbones), tmp_path)
    bare = registry.lookup("backbone", "bare")
    monkeypatch.setattr(bare, "from_hf", classmethod(lambda cls, config: cls(**SIZES)))
    with pytest.raises(
        ValueError, match=r"hf/config\.json: model_type = 'llama': several .* bare, llama: only"
    ):
        lattice.from_pretrained(tmp_path / "hf")
