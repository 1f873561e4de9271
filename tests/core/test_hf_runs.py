"""`lattice export`: what goes along with a run's weights, and that its model card says nothing else."""

import itertools
import json
import re

import pytest
import sentencepiece
import tokenizers
import tomli
import torch
from huggingface_hub import ModelCard

import lattice
from lattice.components.tokenizer.bpe import BpeTokenizer
from lattice.components.tokenizer.bytes import BytesCodec
from lattice.components.tokenizer.huggingface import HuggingFaceTokenizer
from lattice.components.tokenizer.sentencepiece import SentencePieceTokenizer
from lattice.hf.export import export
from lattice.hf.tokenizer import export_tokenizer

transformers = pytest.importorskip("transformers")

RECIPE = {
    "run": {"steps": 6, "batch_tokens": 128, "sequence_tokens": 16, "device": "cpu", "seed": 3},
    "backbone": {
        "kind": "gpt_neox",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "rotary_pct": 0.5,
    },
    "data": {"kind": "embedded", "megabytes": 0.3, "validation_fraction": 0.3},
    "checkpoint": {"kind": "dcp", "every": 2},
    "evaluators": {"validation": {"kind": "perplexity", "every": 2, "max_tokens": 64}},
}
TEXTS = ["def f(x):\n\treturn x  # größer 日本 \x00", "  two  spaces ", "<|endoftext|>?", ""]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a plain model, whose vocabulary is larger than its tokenizer's."""
    folder = tmp_path_factory.mktemp("run") / "plain"
    lattice.train(RECIPE, out=folder)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(run, folder)
    return folder


def table_of(card):
    """The figures of the training table, as they are printed."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", card.content, flags=re.MULTILINE)
    return {name: value for name, value in rows if name.strip()}


# ── the model ─────────────────────────────────────────────────────────────────────────────────────
def test_the_exported_model_is_the_runs(run, exported):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    ours = lattice.load(run)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)


def test_rows_that_are_no_token_are_never_generated(exported):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        head = theirs.get_output_embeddings().weight
        head[260] += 100 * head.abs().max()
        theirs.gpt_neox.final_layer_norm.bias.fill_(1.0)
    ids = torch.arange(20)[None]
    assert int(theirs(ids).logits[0, -1].argmax()) == 260
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 256
    assert theirs.generation_config.suppress_tokens == list(range(257, 300))
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert int(out[:, 20:].max()) < 257


def test_a_checkpoint_instead_of_the_last(run, tmp_path):
    export(run / "checkpoints/step-00000004", tmp_path)
    theirs = lattice.from_pretrained(tmp_path)
    ours = lattice.load(run / "checkpoints/step-00000004")
    for name, parameter in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], parameter)
    figures = table_of(ModelCard.load(tmp_path / "README.md"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation/loss"] for row in rows if row["step"] == 4 and "validation/loss" in row]
    assert (figures["steps"], figures["tokens seen"]) == ("4", "512")
    assert figures["validation loss"] == f"{losses[0]:,.5g}"
    assert "seconds" not in figures, "the summary is of the whole run"


def test_what_is_no_export_is_not_replaced(run, tmp_path):
    """An earlier one is."""
    mine = tmp_path / "README.md"
    for text in ("# My project\n", "---\ntags: [text]\n---\nMine\n"):
        mine.write_text(text)
        with pytest.raises(FileExistsError, match="is not empty and holds no earlier export"):
            export(run, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
        assert mine.read_text() == text
    mine.unlink()
    export(run, tmp_path)
    before = mine.read_text()
    export(run / "checkpoints/step-00000004", tmp_path)
    assert mine.read_text() != before


# ── the card ──────────────────────────────────────────────────────────────────────────────────────
def test_every_figure_of_the_card_is_in_the_runs_files(run, exported):
    card = ModelCard.load(exported / "README.md")
    figures = table_of(card)
    known = {"steps": 6, "tokens seen": 768}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        known |= {"training loss (nats a token)": row["loss"]} if "loss" in row else {}
        known |= {name.replace("/", " ").replace("_", " "): row[name] for name in row if "/" in name}
    summary = json.loads((run / "summary.json").read_text())
    known |= {name.replace("_", " "): value for name, value in summary.items() if name not in ("steps",)}
    assert {"parameters", "seconds", "validation bits per byte"} < figures.keys() <= known.keys()
    for name, printed in figures.items():
        value = known[name]
        assert printed == (f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"), name


def test_the_card_holds_recipe_versions_and_metadata(run, exported):
    card = ModelCard.load(exported / "README.md")
    blocks = re.findall(r"```toml\n(.*?)```", card.content, flags=re.DOTALL)
    table = lattice.load_recipe(RECIPE).table()
    assert tomli.loads(blocks[1]) == table
    assert tomli.loads(blocks[0]) == {name: table[name] for name in ("data", "tokenizer")}
    header = itertools.takewhile(lambda line: line.startswith("#"), (run / "recipe.toml").open())
    for line in header:
        assert f"* {line[1:].strip()}" in card.content
    assert card.data.library_name == "transformers"
    assert {"lattice", "gpt_neox"} <= set(card.data.tags)
    assert "custom_code" not in card.data.tags


def test_the_code_of_the_card_runs(exported):
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names = {}
    exec(blocks[0].replace("path/to/this/directory", str(exported)), names)
    theirs, tokenizer = names["model"], names["tokenizer"]
    exec(blocks[1].replace("path/to/this/directory", str(exported)), names)
    inputs = tokenizer(["import", "de"], return_tensors="pt", padding=True)
    assert inputs.attention_mask.tolist()[1] == [0, 0, 0, 0, 1, 1]
    with torch.no_grad():
        expected = names["model"](inputs.input_ids, inputs.attention_mask).logits
        position = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
        real = inputs.attention_mask.bool()
        logits = theirs(**inputs, position_ids=position).logits
        torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)


# ── the tokenizer ─────────────────────────────────────────────────────────────────────────────────
def assert_the_same_ids(codec, folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    plain = [text for text in TEXTS if "<|" not in text]
    assert [theirs(text).input_ids for text in plain] == codec.encode_batch(plain)
    for text in plain:
        assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == codec.eos_id
    assert (theirs.model_max_length, theirs.padding_side) == (99, "left")


def test_bytes(tmp_path):
    assert export_tokenizer(BytesCodec(), tmp_path / "none", tmp_path, 99)
    assert_the_same_ids(BytesCodec(), tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == 257
    every = bytes(range(256)).decode("latin-1")
    assert theirs.encode(every).ids == list(every.encode())


def test_a_trained_bpe(tmp_path):
    codec = BpeTokenizer(vocab_size=280).build(tmp_path / "saved", lambda: iter(TEXTS * 3))
    assert export_tokenizer(codec, tmp_path / "saved", tmp_path, 99)
    assert_the_same_ids(codec, tmp_path)
    # The run's own description of it holds paths of the machine.
    assert "lattice" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_one_of_hugging_face_adds_nothing_to_a_text(tmp_path):
    """The model has never seen the tokens that some tokenizers put around a text."""
    made = BpeTokenizer(vocab_size=280).build(None, lambda: iter(TEXTS * 3)).tokenizer
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": {"x": "y"}}))
    codec = HuggingFaceTokenizer(name=str(tmp_path)).build(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a").input_ids[0] == made.token_to_id("<s>")
    (tmp_path / "hf").mkdir()
    assert export_tokenizer(codec, tmp_path / "saved", tmp_path / "hf", 99)
    assert_the_same_ids(codec, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.bos_token_id == codec.eos_id, "what lm-eval puts before a text, and lattice does"


def test_tokens_that_the_tokenizer_lacks_get_no_id(tmp_path):
    """A tokenizer_config.json may name tokens that tokenizer.json does not have: nor does the model."""
    made = BpeTokenizer(vocab_size=280).build(None, lambda: iter(TEXTS * 3)).tokenizer
    made.add_special_tokens(["<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    new = {"content": "<new>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    settings = {
        "eos_token": "<|endoftext|>",
        "cls_token": {**new, "content": "<s>", "__type": "AddedToken"},
        "pad_token": "[PAD]",
        "unk_token": {**new, "content": "<unk>", "__type": "AddedToken"},
        "sep_token": "e",  # a word of the vocabulary, and a part of others
        "additional_special_tokens": ["<x>"],
        "extra_special_tokens": {"image_token": "<img>"},
        "model_specific_special_tokens": {"sound_token": "<sound>"},
        "added_tokens_decoder": {"300": {**new, "normalized": False}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    codec = HuggingFaceTokenizer(name=str(tmp_path)).build(tmp_path / "saved")
    (tmp_path / "hf").mkdir()
    assert export_tokenizer(codec, tmp_path / "saved", tmp_path / "hf", 99)
    assert_the_same_ids(codec, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(theirs) == codec.vocab_size
    assert (theirs.pad_token_id, theirs.cls_token_id) == (codec.eos_id, made.token_to_id("<s>"))
    for text in ("a[PAD]b", "<unk>", "<x>", "<img>", "<sound>", "<new>", "the text"):
        assert theirs(text).input_ids == codec.encode_batch([text])[0]


def test_sentencepiece_goes_along_as_it_is(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "two three four"] * 20),
        model_prefix=str(tmp_path / "made"),
        vocab_size=16,
        minloglevel=2,
    )
    made = SentencePieceTokenizer(path=str(tmp_path / "made.model"))
    codec = made.build(tmp_path / "saved")
    (tmp_path / "hf").mkdir()
    assert not export_tokenizer(codec, tmp_path / "saved", tmp_path / "hf", 99)
    again = SentencePieceTokenizer(path=str(tmp_path / "hf/tokenizer.model")).build(None)
    assert again.fingerprint == codec.fingerprint
