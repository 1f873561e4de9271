"""Every tokenizer: what it encodes it decodes, and what it saved it opens."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice import registry
from lattice.components.tokenizer._codecs import FastCodec
from lattice.components.tokenizer.bpe import BpeTokenizer
from lattice.components.tokenizer.bytes import BytesTokenizer
from lattice.components.tokenizer.huggingface import HuggingFaceTokenizer
from lattice.components.tokenizer.sentencepiece import SentencePieceTokenizer
from lattice.prepare import _tokenizer
from lattice.registry import kinds

TEXTS = [
    "the quick brown fox jumps over the lazy dog\n",
    "def f(x):\n    return x + 1\n",
    "Zürich 東京 🙂",
]
CORPUS = [text * 20 for text in TEXTS]
text = st.text(st.characters(exclude_categories=["Cs"]))


def bpe(folder=None, **options):
    return BpeTokenizer(**{"vocab_size": 300, **options}).build(folder, lambda: iter(CORPUS))


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(CORPUS).split("\n")),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "my.model"
    path.write_bytes(model.getvalue())
    return path


@given(text)
def test_bytes_round_trip(sample):
    codec = BytesTokenizer().build(None)
    ids = codec.encode_batch([sample])[0]
    assert bytes(ids) == sample.encode()
    assert codec.decode([*ids, codec.eos_id]) == sample


def test_bytes_decode_of_half_a_character():
    codec = BytesTokenizer().build(None)
    assert codec.decode([0xC3]) == "\ufffd"
    with pytest.raises(ValueError, match="id 257"):
        codec.decode([257])


_codec = bpe()


@given(text)
def test_bpe_round_trip(sample):
    assert _codec.decode(_codec.encode_batch([sample])[0]) == sample


def test_a_document_cannot_end_itself():
    ids = _codec.encode_batch(["a<|endoftext|>b"])[0]
    assert _codec.eos_id not in ids
    assert _codec.decode(ids) == "a<|endoftext|>b"


def test_bpe_is_deterministic_and_reopened(tmp_path):
    first, again = bpe(tmp_path), bpe()
    assert first.fingerprint == again.fingerprint
    reopened = BpeTokenizer(vocab_size=300).build(tmp_path, None)
    assert reopened.fingerprint == first.fingerprint
    assert reopened.encode_batch(TEXTS) == first.encode_batch(TEXTS)
    assert not list(tmp_path.glob("*.partial"))


def test_bpe_saved_with_other_options_is_refused(tmp_path):
    bpe(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size = 290.*trained with 300"):
        bpe(tmp_path, vocab_size=290)


def test_bpe_needs_text():
    with pytest.raises(ValueError, match="--train-bpe"):
        BpeTokenizer().build(None, None)
    with pytest.raises(ValueError, match="no text"):
        BpeTokenizer().build(None, lambda: iter(["", ""]))
    with pytest.raises(ValueError, match="vocab_size = 256"):
        BpeTokenizer(vocab_size=256)


def test_bpe_trains_on_a_bounded_sample():
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield CORPUS[0]

    BpeTokenizer(vocab_size=260, sample_bytes=5000).build(None, endless)
    assert len(drawn) == -(-5000 // len(CORPUS[0].encode()))


def test_huggingface_opens_a_file_and_a_folder_as_the_kind_that_made_it(tmp_path):
    made = bpe(tmp_path / "a")
    for name in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        codec = HuggingFaceTokenizer(name=str(name)).build(tmp_path / "saved")
        assert codec.fingerprint == made.fingerprint
        assert codec.eos_id == made.eos_id
    bpe(tmp_path / "b", vocab_size=280)
    with pytest.raises(ValueError, match="differs from the tokenizer saved"):
        HuggingFaceTokenizer(name=str(tmp_path / "b")).build(tmp_path / "saved")


def test_huggingface_end_of_document(tmp_path):
    bpe(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.unlink()
    assert HuggingFaceTokenizer(name=str(tmp_path)).build(None).eos_id == _codec.eos_id
    config.write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert HuggingFaceTokenizer(name=str(tmp_path)).build(None).decode([_codec.eos_id]) == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"eos = '<x>'.*<\|endoftext\|>"):
        HuggingFaceTokenizer(name=str(tmp_path), eos="<x>").build(None)


def test_huggingface_without_any_end_of_document_lists_special_tokens(tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[SEP]": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["[SEP]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"option 'eos'.*\[SEP\]"):
        HuggingFaceTokenizer(name=str(tmp_path)).build(None)
    codec = HuggingFaceTokenizer(name=str(tmp_path), eos="[SEP]").build(None)
    assert (codec.eos_id, codec.vocab_size) == (1, 2)


def test_huggingface_offline_says_how_to_provide_it(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"tokenizer 'owner/name'.*tokenizer.name.*--tokenizer"):
        HuggingFaceTokenizer(name="owner/name").build(None)
    with pytest.raises(FileNotFoundError, match="no name on the hub"):
        HuggingFaceTokenizer(name="a/b/c").build(None)


def test_huggingface_asks_a_hub_that_does_not_answer_once_and_looks_in_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    made, asked = bpe(tmp_path / "hub"), []

    def no_answer(url):
        asked.append(url)
        raise OSError("no route to host")

    def download(name, file, *, local_files_only):
        assert local_files_only, "a download would ask again and again"
        if name != "owner/cached":
            raise FileNotFoundError("not in the cache")
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_answer)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert HuggingFaceTokenizer(name="owner/cached").build(None).fingerprint == made.fingerprint
    with pytest.raises(FileNotFoundError, match=r"'owner/other'.*OSError: no route to host"):
        HuggingFaceTokenizer(name="owner/other").build(None)
    assert len(asked) == 2


def test_huggingface_from_the_hub_keeps_what_it_took(tmp_path, monkeypatch):
    import huggingface_hub

    made = bpe(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file, **_: str(tmp_path / "hub" / file)
    )
    HuggingFaceTokenizer(name="owner/name").build(tmp_path / "saved")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert HuggingFaceTokenizer(name="owner/name").build(tmp_path / "saved").fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="another tokenizer"):
        HuggingFaceTokenizer(name="owner/other").build(tmp_path / "saved")


def test_fingerprint_tells_tokenizers_apart(tmp_path):
    assert bpe(vocab_size=290).fingerprint != _codec.fingerprint
    other_eos = FastCodec(bpe().tokenizer, "a")
    assert other_eos.fingerprint != _codec.fingerprint


def test_sentencepiece_round_trip_and_reopening(spm_model, tmp_path):
    maker = SentencePieceTokenizer(path=str(spm_model))
    codec = maker.build(tmp_path)
    assert [codec.decode(ids) for ids in codec.encode_batch(TEXTS)] == TEXTS
    assert 0 <= codec.eos_id < codec.vocab_size
    gone = SentencePieceTokenizer(path=str(tmp_path / "gone.model"))
    assert gone.build(tmp_path).fingerprint == codec.fingerprint
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.path"):
        gone.build(None)


def test_sentencepiece_damaged_or_another_model(spm_model, tmp_path):
    bad = tmp_path / "bad.model"
    bad.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.model is no SentencePiece"):
        SentencePieceTokenizer(path=str(bad)).build(None)
    SentencePieceTokenizer(path=str(spm_model)).build(tmp_path / "saved")
    with pytest.raises(ValueError, match="differs"):
        SentencePieceTokenizer(path=str(bad)).build(tmp_path / "saved")


def test_damaged_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no"):
        HuggingFaceTokenizer(name=str(tmp_path)).build(None)


def test_every_spec_has_one_kind(tmp_path):
    bpe(tmp_path)
    specs = {
        "bytes": "bytes",
        "x/y.model": "sentencepiece",
        "gpt2": "huggingface",
        "EleutherAI/pythia-70m": "huggingface",
        str(tmp_path): "huggingface",
        str(tmp_path / "tokenizer.json"): "huggingface",
        "missing/tokenizer.json": "huggingface",
    }
    for spec, expected in specs.items():
        claims = [kind for kind, cls in kinds("tokenizer").items() if cls.from_spec(spec) is not None]
        assert claims == [expected], spec
    for spec in ("bpe", "sentencepiece", "a/b/c"):
        assert not [kind for kind, cls in kinds("tokenizer").items() if cls.from_spec(spec) is not None], spec


def test_a_kind_that_inherits_from_spec_claims_none(monkeypatch):
    monkeypatch.setitem(registry._kinds, "tokenizer", kinds("tokenizer"))
    for kind, base in {"a": BytesTokenizer, "b": HuggingFaceTokenizer}.items():
        registry.register("tokenizer", kind)(
            dataclass(frozen=True, kw_only=True)(type(kind, (base,), {"__module__": __name__}))
        )
    for spec, expected in {"bytes": BytesTokenizer, "gpt2": HuggingFaceTokenizer}.items():
        assert type(_tokenizer(spec, None)[1]) is expected
