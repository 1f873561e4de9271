"""Texts: stop strings, prompts of different lengths in a batch, files of prompts, what is streamed."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lattice
from lattice import cli, report
from lattice.generate import Sampling
from lattice.prompts import read_prompts, unfinished
from lattice.protocols import EvaluationSubject
from lattice.text_generation import Continuation, generate_text

CODEC = lattice.registry.lookup("tokenizer", "bytes")().build(None)
PROMPTS = ["def f(x):", "", "ab", "the quick brown fox", "é", "zz"]
KINDS = {
    "none": {"kind": "none"},
    "thoughts": {"kind": "latent_thoughts", "thoughts": 2},
    "loop": {"kind": "loop", "loops": 1},
}


def tiny(recurrence="thoughts", context=64):
    model = lattice.build_model(
        {
            "backbone": {
                "kind": "llama",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "vocab_size": 300,
                "max_position_embeddings": context,
            },
            "recurrence": KINDS[recurrence],
        }
    ).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("recurrence", list(KINDS))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_batch_gives_each_prompt_what_it_gets_alone(recurrence, temperature, parallel):
    model = tiny(recurrence)
    options = {"max_new_tokens": 9, "parallel_prefill": parallel}
    together = generate_text(
        model, CODEC, PROMPTS, sampling=Sampling(temperature=temperature, seed=5), batch_size=4, **options
    )
    assert [one.prompt for one in together] == PROMPTS
    assert len({one.text for one in together}) > 3
    for number, prompt in enumerate(PROMPTS):
        sampling = Sampling(temperature=temperature, seed=5 + number)
        assert generate_text(model, CODEC, [prompt], sampling=sampling, **options) == [together[number]]


def test_the_text_is_that_of_the_tokens():
    model = tiny()
    ids = CODEC.encode_batch(["ab"])[0]
    expected = lattice.generate(model, torch.tensor([ids]), 12, vocab_size=CODEC.vocab_size)[0].tolist()
    (completion,) = generate_text(model, CODEC, ["ab"], max_new_tokens=12)
    assert completion.text == CODEC.decode(expected)[2:]
    assert (completion.finish, completion.tokens) == ("length", 12)


def test_stop_strings_end_their_row_alone():
    model = tiny()
    free = generate_text(model, CODEC, PROMPTS, max_new_tokens=12)
    stop = free[0].text[3:5]
    assert len(stop) == 2
    stopped = generate_text(model, CODEC, PROMPTS, max_new_tokens=12, stop=[stop, "never seen"])
    assert stopped[0].finish == "stop"
    for before, after in zip(free, stopped, strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at])
        assert after.finish == (before.finish if at < 0 else "stop")
        assert after.tokens <= before.tokens


def test_decoding_ends_when_all_rows_have():
    model, steps = tiny(), []
    free = generate_text(model, CODEC, ["ab"], max_new_tokens=12)[0].text
    model.decoder.head.register_forward_pre_hook(lambda *_: steps.append(1))
    generate_text(model, CODEC, ["ab"], max_new_tokens=12, stop=[free[2]])
    assert len(steps) <= 2 + free.index(free[2]) + 1  # the prompt's tokens, then one for each but the last


class Spelled:
    """A codec whose tokens are the strings given."""

    eos_id = 0

    def __init__(self, tokens):
        self.tokens = [b"", *tokens]

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abé→", max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    stop=st.lists(st.text(alphabet="abé→", min_size=1, max_size=4), max_size=3),
)
def test_what_is_shown_is_the_text_before_the_stop_string_and_never_taken_back(text, cuts, stop):
    """Whatever way the bytes fall into tokens, characters and stop strings cut among them."""
    data, tokens = text.encode(), []
    while data:
        size = cuts[len(tokens) % len(cuts)]
        tokens.append(data[:size])
        data = data[size:]
    row, shown = Continuation(Spelled(tokens), [], stop), ""
    for number in range(1, len(tokens) + 1):
        shown += row.add(number)
        if row.finish:
            break
    shown += row.rest()
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    assert "\ufffd" not in shown
    if ends:
        assert row.finish == "stop"
        # the stop string that is complete first ends the text; another may have begun before it
        assert shown == row.text == text[: len(shown)]
        assert len(shown) in ends
    else:
        assert shown == row.text == text
        assert row.finish is None


class ByteFallback(Spelled):
    """As tokenizers with byte fallback decode: bytes in a row are one text, or none of them is."""

    def decode(self, ids):
        data = b"".join(self.tokens[i] for i in ids)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(data)


@pytest.mark.parametrize("prompt", [0, 3])
def test_a_character_cut_short_takes_none_of_those_before_it(prompt):
    tokens = [bytes([one]) for one in "日本語".encode()]
    ids = range(1, len(tokens) + 1)
    row = Continuation(ByteFallback(tokens), ids[:prompt])
    shown = "".join(row.add(number) for number in ids[prompt:-1]) + row.rest()
    assert shown == row.text == "日本\ufffd"[prompt // 3 :]
    assert row.add(ids[-1]) == ""  # what was shown is not taken back
    assert row.text == "日本語"[prompt // 3 :]


def test_the_end_of_the_document_ends_the_text():
    row = Continuation(Spelled([b"a", b"b"]), [1], ["bx"])
    assert row.add(2) == ""  # may begin the stop string
    assert row.add(0) == "b"
    assert row.finish == "end"
    assert (row.text, row.tokens) == ("b", 2)


def test_a_sample_ends_where_the_document_does():
    """The evaluator's: what a next document would begin with is no part of it."""
    model, scripted = tiny(), iter([98, 99, CODEC.eos_id, 100, 101])

    def next_logits(*_):
        logits = torch.zeros(1, 300, dtype=torch.float64)
        logits[0, next(scripted)] = 9.0
        return logits

    model.decoder.head.register_forward_hook(next_logits)
    subject = EvaluationSubject(
        model=model,
        codec=CODEC,
        open_source=lambda: pytest.fail("read"),
        autocast=nullcontext,
        device=torch.device("cpu"),
        step=0,
    )
    sample = lattice.registry.lookup("evaluator", "sample")(prompt="a", max_new_tokens=5, temperature=0.0)
    assert sample.evaluate(subject) == {"text": "abc"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a", "b" * 60]}, "prompt 2: a prompt of 60 tokens and 9 new ones do not fit"),
        ({"prompts": ["b" * 60]}, "^a prompt of 60 tokens"),
        ({"prompts": ["a"], "stop": [""]}, "stop = ''"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size = 0"),
    ],
)
def test_what_cannot_be(options, message):
    model = tiny()
    model.decoder.forward = None  # nothing is computed
    with pytest.raises(ValueError, match=message):
        generate_text(model, CODEC, max_new_tokens=9, **options)


def test_prompts_from_files(tmp_path):
    lines = tmp_path / "p.txt"
    lines.write_bytes("one\r\n\ntwo é\n".encode())
    assert read_prompts(lines) == ["one", "", "two é"]
    table = tmp_path / "p.jsonl"
    table.write_text('{"prompt": "a\\nb", "x": 1}\n\n{"prompt": ""}\n')
    assert read_prompts(table) == ["a\nb", ""]
    for text, message in [
        ('{"prompt": "a"}\n{"promt": "b"}\n', r'p.jsonl:2: must be an object with a string "prompt"'),
        ('{"prompt": "a"\n', r"p.jsonl:1: no valid JSON"),
        ('{"prompt": 3}\n', r"p.jsonl:1: must be an object"),
    ]:
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(table)
    lines.write_bytes(b"ok\n\xff\n")
    with pytest.raises(ValueError, match=r"p.txt: byte 3: not UTF-8"):
        read_prompts(lines)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_prompts(tmp_path / "nowhere")


def test_an_interrupted_file_goes_on(tmp_path):
    out = tmp_path / "out.jsonl"
    assert unfinished(["a", "b"], out) == [(0, "a"), (1, "b")]
    out.write_text(json.dumps({"number": 1, "prompt": "b", "text": "x"}) + '\n{"number": 0, "pro')
    assert unfinished(["a", "b"], out) == [(0, "a")]
    assert out.read_text().endswith('"x"}\n')  # the line that was cut off is gone, the whole one is not
    with pytest.raises(ValueError, match=r"out.jsonl:1: is of other prompts"):
        unfinished(["a", "c"], out)


def test_an_interrupted_file_may_hold_any_text(tmp_path):
    """Characters that some take for the end of a line, and a cut within one."""
    out, odd = tmp_path / "out.jsonl", "a\u2028b\x85c"
    line = json.dumps({"number": 0, "prompt": odd, "text": "é"}, ensure_ascii=False).encode()
    out.write_bytes(line + b"\n" + line[:-3])
    assert unfinished([odd, "b"], out) == [(1, "b")]
    assert out.read_bytes() == line + b"\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "run": {"steps": 2, "batch_tokens": 64, "sequence_tokens": 16},
        "backbone": {
            "kind": "llama",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "vocab_size": 260,
            "max_position_embeddings": 64,
        },
        "recurrence": {"kind": "latent_thoughts", "thoughts": 1},
        "data": {"kind": "embedded", "megabytes": 0.05},
        "evaluators": {"validation": {"kind": "perplexity", "max_tokens": 64}},
    }
    lattice.train(recipe, out=folder / "r")
    return folder / "r"


def command(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_of_many_prompts(trained, tmp_path, capsys):
    prompts, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("def f\nimport\nx\n")
    options = ("--prompts", prompts, "--max-new-tokens", 6, "--temperature", 0, "--batch", 2)
    code, printed, said = command(capsys, "generate", trained, *options, "--out", out)
    assert (code, printed) == (0, "")
    assert "3 prompts, 0 done before: token by token, in sequence (latent_thoughts, 2 slots a token)" in said
    rows = sorted(map(json.loads, out.read_text().splitlines()), key=lambda row: row["number"])
    expected = generate_text(lattice.load(trained), CODEC, ["def f", "import", "x"], max_new_tokens=6)
    assert [row["text"] for row in rows] == [one.text for one in expected]
    whole = out.read_text()
    out.write_text(whole.splitlines(keepends=True)[0])
    _, _, said = command(capsys, "generate", trained, *options, "--out", out)
    assert "2 prompts, 1 done before" in said
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())
    _, printed, _ = command(capsys, "generate", trained, *options)
    assert sorted(printed.splitlines()) == sorted(whole.splitlines())
    for otherwise in (("--seed", 3), ("--set", "recurrence.thoughts=2"), ("--stop", "e")):
        code, _, said = command(capsys, "generate", trained, *options, *otherwise, "--out", out)
        name, value = otherwise[0].removeprefix("--"), otherwise[1]
        assert code == 2
        assert f"out.jsonl:1: was generated otherwise: {name} " in said
        assert str(value) in said.split(" there, ")[1]
    shutil.copytree(trained, tmp_path / "another")
    _, _, said = command(capsys, "generate", tmp_path / "another", *options, "--out", out)
    assert "was generated otherwise: checkpoint" in said
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())


def test_a_file_goes_on_from_wherever_its_model_is_named(trained, tmp_path, monkeypatch, capsys):
    out, prompts = tmp_path / "out.jsonl", ("--prompt", "a", "--prompt", "b")
    (tmp_path / "link").symlink_to(trained)
    options = (*prompts, "--max-new-tokens", 2, "--temperature", 0, "--out", out)
    assert command(capsys, "generate", trained, *options)[0] == 0
    first, _ = lines = out.read_text().splitlines(keepends=True)
    monkeypatch.chdir(trained.parent)
    for name in ("r", "../" + trained.parent.name + "/r", tmp_path / "link"):
        out.write_text(first)
        code, _, said = command(capsys, "generate", name, *options)
        assert (code, "2 prompts" in said, out.read_text()) == (0, False, "".join(lines)), said
    row = json.loads(first)  # as it was written before paths were resolved
    row["settings"]["checkpoint"] = str(Path("r") / Path(row["settings"]["checkpoint"]).relative_to(trained))
    out.write_text(json.dumps(row) + "\n")
    for name in ("r", trained, trained):
        code, _, said = command(capsys, "generate", name, *options)
        assert code == 0, said
    monkeypatch.chdir(tmp_path)  # where that is no model
    code, _, said = command(capsys, "generate", trained, *options)
    assert code == 2
    assert "was generated otherwise: checkpoint" in said


def test_thoughts_and_iterations_change_at_inference(trained, capsys):
    common = ("generate", trained, "--prompt", "def ", "--max-new-tokens", 8, "--temperature", 0)
    code, _, said = command(capsys, *common, "--prefill", "parallel", "--set", "recurrence.jacobi.eval=9")
    assert code == 0
    assert "prompt of 4 tokens: all tokens at once by the solver" in said
    code, _, said = command(capsys, *common, "--set", "recurrence.thoughts=3")
    assert "4 slots a token" in said
    assert lattice.load(trained, overrides=["recurrence.thoughts=3"]).recurrence.thoughts == 3
    code, _, said = command(capsys, *common, "--set", "recurrence.kind=loop")
    assert "all tokens at once, which is exact (loop)" in said
    code, _, said = command(capsys, *common, "--set", "backbone.hidden_size=32")
    assert code == 2
    assert "another model" in said or "shape" in said or "must be" in said
    code, _, said = command(capsys, *common, "--device", "tpu")
    assert code == 2
    assert "device = 'tpu'" in said
    assert "run.device" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --prompt or --prompts"),
        (("--prompt", "a", "--prompts", "b"), "give either"),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
        (("--prompt", "a", "--stop", ""), "stop = ''"),
        (("--prompt", "a", "--prefill", "both"), "both"),
    ],
)
def test_commands_that_cannot_be(trained, capsys, arguments, message):
    code, _, said = command(capsys, "generate", trained, *arguments)
    assert code == 2
    assert message in said


def test_streaming_stops_before_the_stop_string(trained, capsys):
    model = lattice.load(trained)
    (free,) = generate_text(model, CODEC, ["def "], max_new_tokens=10)
    stop = free.text[4]
    report.stream_text(model, CODEC, "def ", 10, Sampling(), stop=[stop])
    assert capsys.readouterr().out == "def " + free.text[: free.text.index(stop)] + "\n"
