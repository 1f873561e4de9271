"""lm-eval in process: against lm-eval's own Hugging Face model, and in batches as alone."""

import json
import random
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice import harness
from lattice.build import build_model
from lattice.hf.export import export
from lattice.lm_eval_model import Generation, LatticeLM
from lattice.lm_eval_model import main as lm_eval_main
from lattice.load import load_subject
from lattice.recipe import RecipeError
from lattice.run_folder import training_steps
from lattice.world import World
from tests.evaluation.small_runs import RECIPE, train

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'lattice[eval]'")


def responses(found):
    """Every answer of every item, flat."""
    return [answer for samples in found["samples"].values() for item in samples for answer in item["resps"]]


def instance(kind, *arguments):
    return lm_eval.api.instance.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def write_task(path, like, **changes):
    """A task file like another."""
    task = json.loads(like.read_text()) | {"task": path.stem, **changes}
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items()))


def test_the_same_as_the_hugging_face_model(runs, tasks, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    export(runs["plain"], tmp_path / "hf")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs, ours = (
        lm_eval.simple_evaluate(
            model=model, tasks=["choices", "rolling", "continue"], task_manager=manager, bootstrap_iters=0
        )
        for model in (
            HFLM(pretrained=str(tmp_path / "hf"), batch_size=2, device="cpu", dtype="float32"),
            LatticeLM(runs["plain"], batch_size=3, device="cpu"),
        )
    )
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["choices"][metric] == theirs["results"]["choices"][metric]
    assert ours["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(
        theirs["results"]["rolling"]["bits_per_byte,none"], abs=1e-5
    )
    for mine, other in zip(responses(ours), responses(theirs), strict=True):
        mine, other = mine[0], other[0]
        if isinstance(mine, tuple):
            assert mine[0] == pytest.approx(other[0], abs=1e-4)
            assert mine[1] == other[1]
        elif isinstance(mine, float):
            assert mine == pytest.approx(other, abs=1e-3)  # of a whole text
        else:
            assert mine == other


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_requests_in_a_batch_score_as_they_do_alone(runs, batch_size):
    """Padding changes nothing, and rows that share their input get each their own answer."""
    model = LatticeLM(runs["thinking"], batch_size=batch_size, device="cpu")
    ids = [model.tok_encode(text) for text in ("abc", "a", "a longer text of many words", "abc")]
    scored = [model.tok_encode(text) for text in (" d", " more", "!", " e")]
    requests = [(None, context, answer) for context, answer in zip(ids, scored, strict=True)]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (total, greedy), (_, context, answer) in zip(found, requests, strict=True):
        with torch.no_grad():
            logits_LV = model.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        logs_LV = logits_LV.log_softmax(-1)
        assert total == pytest.approx(
            sum(float(row[token]) for row, token in zip(logs_LV, answer, strict=True)), abs=1e-4
        )
        assert greedy == (logs_LV.argmax(-1).tolist() == answer)


RECURRENCES = [
    {"kind": "none"},
    {"kind": "pause", "pauses": 2},
    {"kind": "loop"},
    {"kind": "ponder", "steps": 2},
    {"kind": "hidden_ponder", "steps": 1},
    {"kind": "depth", "prelude": 0, "coda": 0},
    {"kind": "latent_thoughts", "thoughts": 2, "position_ids": "fresh"},
    {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel"},
]
STOPS_EARLY = {"kind": "latent_thoughts", "jacobi": {"eval": 9}, "tolerance": 0.03}


def untrained(runs, batch_size, **tables):
    """Of a recurrence, and a list that gets the number of tokens of each batch it computes."""
    model = build_model({"backbone": RECIPE["backbone"], "run": {"seed": 1}, **tables}).eval()
    given, computed = model.hidden_states, []

    def counted(ids_BL, real_BL, **options):
        computed.append(ids_BL.numel() if real_BL is None else int(real_BL.sum()))
        return given(ids_BL, real_BL, **options)

    model.hidden_states = counted
    subject = replace(load_subject(runs["plain"], device="cpu"), model=model)
    return LatticeLM(subject, batch_size=batch_size), computed


def tokens(least, most):
    return st.lists(st.integers(0, 3), min_size=least, max_size=most)


@settings(max_examples=50, deadline=None)
@given(
    recurrence=st.sampled_from([*RECURRENCES, STOPS_EARLY]),
    mask=st.sampled_from([{"kind": "causal"}, {"kind": "document", "window": 5, "thoughts": "last"}]),
    questions=st.lists(
        st.tuples(tokens(1, 40), st.lists(tokens(1, 12), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    batch_size=st.integers(1, 8),
)
def test_answers_to_one_question_score_as_they_do_alone(runs, recurrence, mask, questions, batch_size):
    """Whatever the recurrence, where it may share a row and where not, and where some are too long."""
    model, _ = untrained(runs, batch_size, recurrence=recurrence, mask=mask)
    requests = [(None, context, answer) for context, answers in questions for answer in answers]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (total, greedy), (_, context, answer) in zip(found, requests, strict=True):
        ids = (context + answer)[-49:]
        with torch.no_grad():
            logits_LV = model.model(torch.tensor([ids[:-1]])).logits[0, -len(answer) :]
        logs_LV = logits_LV.log_softmax(-1)
        assert total == pytest.approx(float(logs_LV.gather(1, torch.tensor(answer)[:, None]).sum()), rel=1e-5)
        assert greedy == (logs_LV.argmax(-1).tolist() == answer)


@pytest.mark.parametrize(
    ("recurrence", "expected"), [*[(one, 20 + 4 * 2) for one in RECURRENCES], (STOPS_EARLY, 4 * 22)]
)
def test_a_context_is_computed_once(runs, recurrence, expected):
    """But for a recurrence that looks at a row as a whole, and says so."""
    model, computed = untrained(runs, 16, recurrence=recurrence)
    question = list(range(20))
    model._loglikelihood_tokens([(None, question, [30 + n, 3, 4]) for n in range(4)], disable_tqdm=True)
    assert sum(computed) == expected


def test_rows_that_cannot_branch_are_refused(runs):
    model, _ = untrained(runs, 1, recurrence=STOPS_EARLY)
    with pytest.raises(ValueError, match="branches: with this recurrence"):
        model.model.hidden_states(torch.zeros(1, 2).long(), None, branches=torch.tensor([[0, 1]]))


@pytest.mark.parametrize("context", [" ", "\n\n"])
def test_a_context_of_whitespace_is_scored_after_the_prefix(runs, context):
    model = LatticeLM(runs["plain"], device="cpu")
    for continuation in ("a", "import os"):
        asked = [("", context + continuation), (context, continuation)]
        expected, found = model.loglikelihood([instance("loglikelihood", *pair) for pair in asked])
        assert found == expected


def test_a_request_that_is_too_long_keeps_its_end(runs, caplog):
    model = LatticeLM(runs["plain"], device="cpu")
    context, answer = model.tok_encode("x" * 60 + "end"), model.tok_encode("ing")
    long, short = model._loglikelihood_tokens(
        [(None, context, answer), (None, context[-(49 - len(answer)) :], answer)], disable_tqdm=True
    )
    assert long[0] == pytest.approx(short[0], abs=1e-5)
    assert "1 of 2 requests lose their beginning: the longest has 66 tokens" in caplog.text


def test_a_continuation_that_is_too_long_is_scored_by_its_end_and_that_is_said(runs, caplog):
    model = LatticeLM(runs["plain"], device="cpu")
    (whole,) = model._loglikelihood_tokens([(("a", "…"), [65], [66] * 48)])
    assert "by their end alone" not in caplog.text
    (cut,) = model._loglikelihood_tokens([(("a", "…"), [67], [65] + [66] * 48)])
    assert cut == whole
    assert "1 of 1 continuations are scored by their end alone: the longest has 49 tokens" in caplog.text


def test_a_prompt_that_is_too_long_to_go_on_keeps_its_end_and_that_is_said(runs, caplog):
    """Once for all that ask alike, with the tokens that they are to leave room for."""
    model = LatticeLM(runs["plain"], device="cpu")
    few, many = {"max_gen_toks": 6}, {"max_gen_toks": 16}
    asked = [("y" * 42, few), ("x" * 9 + "y" * 42, few), ("y" * 33, many), ("", many)]
    whole, cut, *_ = model.generate_until([instance("generate_until", *one) for one in asked])
    assert cut == whole
    lost = "1 of 2 requests lose their beginning: the longest has"
    assert [record.message for record in caplog.records] == [
        f"{lost} 51 tokens, and the model's context of 48 leaves 42 beside 6 new ones",
        f"{lost} 33 tokens, and the model's context of 48 leaves 32 beside 16 new ones",
    ]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_how_many_tokens_a_task_wants(name):
    given = Generation({name: 16, "do_sample": True, "temperature": 1.0, "top_k": 0})
    assert given.new_tokens == 16
    assert given.sampling.top_k is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 10}, r"num_beams = 10: must be 1$"),
        ({"min_p": 0.1}, r"min_p = 0.1: must be of until, max_gen_toks, .*, top_p, num_beams$"),
        ({"seed": 3}, r"seed = 3: must be of until"),
        ({"do_sample": True}, r"temperature = 0: must be more than 0 with do_sample = True"),
        ({"do_sample": True, "temperature": 0.0}, r"temperature = 0: must be more than 0 with"),
    ],
)
def test_what_a_generation_cannot_heed_is_refused(options, message, runs, tasks, tmp_path):
    """Before the first question, as all that keeps a task from its work."""
    with pytest.raises(ValueError, match=f"^generation_kwargs: {message}"):
        Generation(options)
    write_task(tmp_path / "asks.yaml", tasks / "continue.yaml", generation_kwargs=options)
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["asks"]}))
    with pytest.raises(ValueError, match=f"^task 'asks': generation_kwargs: {message}"):
        harness.check_tasks("both", context=48, include=tmp_path)


CANNOT = {
    "long": ({"generation_kwargs": {"max_gen_toks": 48}}, r"max_gen_toks = 48: must be less than .* of 48$"),
    "silent": ({"generation_kwargs": None}, r"max_gen_toks = 256: must be less than the context of 48$"),
    "misspelt": ({"doc_to_text": "{{texd}}"}, r"UndefinedError: 'texd' is undefined \(<template>, line 1"),
    "wide": (
        {"num_fewshot": 3},
        r"with 3 solved examples from 3 documents: Sample larger than population or is negative$",
    ),
    "blank": (
        {"output_type": "loglikelihood", "doc_to_target": "", "metric_list": None},
        r"the continuation of 'def f\(x\):\\n    return x' is empty: there is nothing to score$",
    ),
    "coded": ({"unsafe_code": True}, r"runs code that the model writes, which is not done here$"),
    "seen": ({"doc_to_image": "text"}, r"asks about pictures or sounds, and the model reads text alone$"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_a_task_that_cannot_be_asked_is_named_before_the_first_question(tasks, tmp_path, name):
    changes, message = CANNOT[name]
    trimmed = {"doc_to_text": "{{text | trim}}", "fewshot_split": "test", **changes}
    write_task(tmp_path / f"{name}.yaml", tasks / "continue.yaml", **trimmed)
    with pytest.raises(ValueError, match=f"^task '{name}': {message}"):
        harness.check_tasks(name, context=48, include=tmp_path)


def test_an_answer_without_text_is_said_of_its_task(tasks, tmp_path):
    write_task(tmp_path / "empty.yaml", tasks / "choices.yaml", doc_to_choice=["", "b"])
    with pytest.raises(ValueError, match=r"^task 'empty': IndexError: .* \(task.py, line .*choice\[0\]"):
        harness.check_tasks("empty", context=48, include=tmp_path)


def test_tasks_are_checked_with_every_number_of_solved_examples(tasks, tmp_path, capfd):
    """Whichever comes first, but for tasks whose own number is 0, which lm-eval heeds. No bars are drawn."""
    split = {"fewshot_split": "test"}
    write_task(tmp_path / "four.yaml", tasks / "choices.yaml", **split)
    write_task(tmp_path / "none.yaml", tasks / "choices.yaml", **split, num_fewshot=0)
    harness.check_tasks(["four", "none"], context=48, include=tmp_path, few_shot=(0, 3, None))
    harness.check_tasks("none", context=48, include=tmp_path, few_shot=(7,))
    for few_shot in ((0, 7), (7, 0)):
        with pytest.raises(ValueError, match=r"^task 'four': with 7 solved examples from 4 documents: "):
            harness.check_tasks(["none", "four"], context=48, include=tmp_path, few_shot=few_shot)
    assert not capfd.readouterr().err


def test_a_task_in_two_of_those_named_is_refused(tasks, tmp_path):
    """lm-eval would, when it begins; by a tag it may be named twice."""
    write_task(tmp_path / "one.yaml", tasks / "choices.yaml", tag="tagged")
    (tmp_path / "all.yaml").write_text(json.dumps({"group": "all", "task": ["one"]}))
    harness.check_tasks(["one", "tagged"], context=48, include=tmp_path)
    with pytest.raises(ValueError, match=r"^task 'one': is asked for twice, by 'one' and by 'all'$"):
        harness.check_tasks(["one", "all"], context=48, include=tmp_path)


def test_a_generation_is_greedy_or_drawn_as_the_task_says():
    for greedy in ({}, {"num_beams": 1}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}):
        assert Generation(greedy).sampling.temperature == 0
    for drawn in ({"do_sample": None, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}):
        assert Generation(drawn).sampling.temperature == 0.7


def test_nothing_cannot_be_scored(runs):
    model = LatticeLM(runs["plain"], device="cpu")
    with pytest.raises(ValueError, match="the continuation of 'ab' is empty"):
        model._loglikelihood_tokens([(("ab", ""), [65, 66], [])])


def test_tasks_while_training(tasks, tmp_path):
    choices = {"kind": "lm_eval", "tasks": "choices", "include": str(tasks), "every": 2, "limit": 2}
    folder = train(tmp_path / "run", evaluators={"downstream": {**choices, "few_shot": [0, 1]}})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for shots in (0, 1):
        assert [row["step"] for row in rows if f"downstream/choices/{shots}shot/acc" in row] == [2, 4]
    quiet = train(tmp_path / "quiet")
    with_tasks, without = ([row["loss"] for row in training_steps(run)] for run in (folder, quiet))
    assert with_tasks == without  # evaluating leaves the training alone


def test_an_evaluator_of_tasks_that_cannot_work_is_named_before_the_first_step(tasks, tmp_path):
    """With each of its numbers of solved examples, and the context that its texts are to fit."""
    write_task(tmp_path / "long.yaml", tasks / "continue.yaml", generation_kwargs={})
    write_task(tmp_path / "four.yaml", tasks / "choices.yaml")
    of_tasks = {"kind": "lm_eval", "include": str(tmp_path), "every": 2}
    evaluators = {"texts": {**of_tasks, "tasks": "long"}, "shots": {**of_tasks, "tasks": "four"}}
    evaluators["shots"]["few_shot"] = [0, 7]
    with pytest.raises(RecipeError) as caught:
        train(tmp_path / "run", evaluators=evaluators)
    texts, shots = caught.value.problems
    assert texts.endswith(
        "[evaluators.texts]: task 'long': max_gen_toks = 256: must be less than the context of 48"
    )
    assert "[evaluators.shots]: task 'four': with 7 solved examples from 4 documents: " in shots
    assert not training_steps(tmp_path / "run")


def test_a_task_that_draws_is_always_the_same_and_disturbs_no_generator(runs, tasks, tmp_path):
    """As gpqa, which shuffles its answers."""
    import datasets

    (tmp_path / "utils.py").write_text(
        "import random\nimport numpy\nimport torch\n\ndef process_docs(dataset):\n    def drawn(doc):\n"
        "        number = f'{random.random()} {numpy.random.rand()} {float(torch.rand(1))}'\n"
        "        return {**doc, 'q': number}\n    return dataset.map(drawn)\n"
    )
    write_task(tmp_path / "drawn.yaml", tasks / "choices.yaml")
    with (tmp_path / "drawn.yaml").open("a") as file:
        file.write("process_docs: !function utils.process_docs\n")

    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    subject = load_subject(runs["plain"], device="cpu")
    asked, datasets_cached = [], datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        for seed in (1, 2):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            expected = draws()
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            if seed == 1:  # checked before or not
                harness.check_tasks("drawn", context=48, include=tmp_path, few_shot=(0, 2))
            found = harness.run_tasks(subject, "drawn", include=tmp_path, few_shot=2, samples=True)
            asked.append([sample["arguments"][0][0] for sample in found.samples["drawn"]])
            assert draws() == expected
    finally:
        if datasets_cached:
            datasets.enable_caching()
    assert asked[0] == asked[1]
    assert len(set(asked[0])) == 4


def test_a_metric_that_is_no_mean_forks_no_pool(runs, tasks, tmp_path, monkeypatch):
    """The processes of a training are not to be forked, and one of the pool's would compute it all."""
    metric = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    write_task(
        tmp_path / "likely.yaml",
        tasks / "choices.yaml",
        output_type="loglikelihood",
        doc_to_target=" {{options[0]}}",
        metric_list=[metric],
    )
    monkeypatch.setattr("multiprocessing.Pool", None)
    found = harness.run_tasks(load_subject(runs["plain"], device="cpu"), "likely", include=tmp_path)
    assert found.figures["likely"]["perplexity_stderr"] > 0


def test_ranks_that_ask_different_things_are_told_apart(runs):
    """By the data of a task: the ranks may have caches of their own."""
    model, _ = untrained(runs, 1, recurrence={"kind": "none"})
    asked = []

    class TwoRanks(World):
        def agree(self, what, value):
            asked.append(value)

    model.subject = replace(model.subject, world=TwoRanks())
    for context in ("a", "a", "b"):
        model.loglikelihood([instance("loglikelihood", context, " c")], disable_tqdm=True)
    for context in ("a", "a", "b"):
        model.generate_until([instance("generate_until", context, {"max_gen_toks": 1})], disable_tqdm=True)
    assert [asked[at] == asked[at + 1] for at in (0, 1, 3, 4)] == [True, False, True, False]


def test_on_the_command_line_of_lm_eval(runs, tasks, monkeypatch, capsys):
    run = ["--model", "lattice", "--model_args", f"run={runs['thinking']},thoughts=1"]
    arguments = ["lm-eval", "run", *run, "--tasks", "choices", "--include_path", str(tasks)]
    monkeypatch.setattr("sys.argv", arguments)
    lm_eval_main()
    assert "|choices|" in capsys.readouterr().out.replace(" ", "")


def test_data_that_cannot_be_reached(runs, tasks, monkeypatch):
    """What to type is said, with the names of those tasks that can be had otherwise."""

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'x' on the Hub")

    monkeypatch.setattr(lm_eval, "simple_evaluate", refuse)
    subject = load_subject(runs["plain"], device="cpu")
    with pytest.raises(ValueError, match=r"the data of choices cannot be had(.|\n)*none of these"):
        harness.run_tasks(subject, ["choices"], include=tasks)
    said = harness._missing(harness.PAPER, {"piqa"}, ConnectionError())
    assert "the data of lambada_openai, lambada_standard, winogrande," in said
    assert "`--tasks lambada_openai piqa winogrande arc_easy arc_challenge sciq hellaswag --include" in said


def test_the_hub_is_offline_where_its_library_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        assert ("HF_HUB_OFFLINE is set" in harness._missing(["piqa"], set(), ConnectionError())) == offline


def test_lm_evals_own_tasks_are_known_to_a_local_group(tasks, tmp_path, caplog):
    """And read only where they may be asked for: that takes seconds."""
    (tmp_path / "choices.yaml").write_text((tasks / "choices.yaml").read_text())
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["choices", "piqa"]}))
    assert "piqa" not in harness._named("choices", tmp_path)[2].all_tasks
    assert "piqa" in harness._named("both", tmp_path)[2].all_tasks
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "piqa.yaml").write_text(
        (tasks / "choices.yaml").read_text().replace("choices", "piqa", 1)
    )
    harness._named(["piqa", "sciq"], tmp_path / "again")
    assert not caplog.records, "that it goes before lm-eval's own was asked for"


def test_tasks_of_a_folder_are_those_its_files_hold(tasks, tmp_path):
    """Whatever the files are called."""
    (tmp_path / "piqa.yaml").write_text((tasks / "choices.yaml").read_text())
    assert harness._named("piqa", tmp_path)[2].task_index["piqa"].yaml_path != tmp_path / "piqa.yaml"
    assert "piqa" not in harness._named("choices", tmp_path)[2].all_tasks


def test_paper_tasks_are_nine():
    assert len(harness.expand("paper")) == len(harness.expand(["paper", "piqa"])) == 9
