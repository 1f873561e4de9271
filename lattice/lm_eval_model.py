"""A run as a model of lm-eval (EleutherAI/lm-evaluation-harness), in process and on its command line:

    python -m lattice.lm_eval_model --model lattice --model_args run=runs/mine,thoughts=2 --tasks piqa

The only file that imports lm-eval. Shapes: B rows, L tokens, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from rich.progress import track

from lattice.branching import Row, Text, rows
from lattice.console import errors
from lattice.generate import Sampling
from lattice.load import load_subject
from lattice.padding import padded
from lattice.protocols import EvaluationSubject
from lattice.text_generation import complete

log = logging.getLogger(__name__)
T = TypeVar("T")
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What lm-eval remembers a request by, ids of the context, ids of what is scored."""
MAX_NEW_TOKENS = 256
"""Of a generation whose task does not say, as in lm-eval's Hugging Face model."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks say it; lm-eval's own models take the first of these that is given."""
OPTIONS = ("until", *LIMITS, "do_sample", "temperature", "top_k", "top_p", "num_beams")
"""Of a generation, those that are heeded."""


@register_model("lattice")
class LatticeLM(TemplateLM):
    """Scores by the parallel evaluation of the recurrence, at its number of iterations for evaluation;
    generates strictly in sequence."""

    def __init__(
        self,
        run: str | Path | EvaluationSubject,
        thoughts: int | None = None,
        iterations: int | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        trust_imports: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        """`run` is a run's directory, one of its checkpoints, or what `lattice.load.load_subject` gave."""
        super().__init__()
        size = str(batch_size).partition(":")[0]
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"batch_size = {batch_size}: must be a whole number of at least 1")
        self.batch_size = int(size)
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # lm-eval's command line says so if nobody chose another
        if not isinstance(run, EvaluationSubject):
            run = load_subject(
                run,
                thoughts=thoughts,
                iterations=iterations,
                device=device or "auto",
                trust_imports=trust_imports,
            )
        self.subject = run
        self.model, self.codec = run.model, run.codec
        self.max_length = self.model.shape.context

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"lattice-{self.codec.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.codec.encode_batch([string])[0]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text from its own beginning, in windows that do not overlap; every token scored once."""
        windows: list[tuple[int, Request]] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, scored = utils.make_disjoint_window(pair)
                windows.append((index, (None, context, scored)))
        scores = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm=disable_tqdm)
        totals = [0.0] * len(requests)
        for (index, _), (score, _) in zip(windows, scores, strict=True):
            totals[index] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding gives.

        Requests whose inputs begin alike, such as the answers to one question, share a row, where the
        recurrence lets them; those with the same input always do. Rows of like length share a batch, the
        longest first. A context without tokens, as lm-eval makes of whitespace, is the prefix token.
        """
        self._agree(requests)
        for texts, context, scored in requests:
            if not scored:
                asked = texts[0] if texts else f"{len(context)} tokens"
                raise ValueError(f"the continuation of {asked!r} is empty: there is nothing to score")
        whole = [(context or [self.prefix_token_id]) + scored for _, context, scored in requests]
        if too_long := [len(ids) for ids in whole if len(ids) > self.max_length + 1]:
            log.warning(
                f"{len(too_long)} of {len(whole)} requests lose their beginning: the longest has "
                f"{max(too_long)} tokens, and the model's context is {self.max_length}"
            )
        if cut := [len(scored) for _, _, scored in requests if len(scored) > self.max_length]:
            log.warning(
                f"{len(cut)} of {len(whole)} continuations are scored by their end alone: the longest has "
                f"{max(cut)} tokens, and the model's context is {self.max_length}"
            )
        inputs = [tuple(ids[-(self.max_length + 1) :][:-1]) for ids in whole]
        of_input: dict[Text, list[int]] = {}
        for index, ids in enumerate(inputs):
            of_input.setdefault(ids, []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        batches = self._batches(of_input)
        world = self.subject.world
        mine: dict[int, tuple[float, bool]] = {}
        hidden = disable_tqdm or not errors.is_terminal
        own = batches[world.data_rank :: world.data_size]
        for batch in track(own, "scoring", console=errors, disable=hidden, transient=True):
            for ids, hidden_LD in self._hidden(batch):
                for index in of_input[ids]:
                    texts, scored = requests[index][0], requests[index][2]
                    mine[index] = self._score(hidden_LD, scored)
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, mine[index])
        return [(score, greedy) for score, greedy in self._of_all(answers, mine)]

    def _batches(self, inputs: Iterable[Text]) -> list[list[Row]]:
        """Of as many inputs as were asked for, however many rows they are, and of one row at least."""
        recurrence, cost = self.model.recurrence, self.model.components["backbone"].layer_cost
        most = self.max_length if recurrence.rows_may_branch else 0
        alone = (cost.project + cost.local + cost.finish) / (cost.attention * recurrence.slots)
        batches: list[list[Row]] = []
        room = 0
        for row in sorted(rows(inputs, most, alone), key=lambda row: row.size, reverse=True):
            if not batches or len(row.texts) > room:
                batches.append([])
                room = self.batch_size
            batches[-1].append(row)
            room -= len(row.texts)
        return batches

    def _agree(self, requests: Iterable[Any]) -> None:
        """Answers to other questions than rank 0 asks, which a task's data may make, are never joined."""
        digest = hashlib.sha256()
        for request in requests:
            digest.update(repr(request).encode())
        what = "what the tasks ask, with the data in this host's cache (HF_DATASETS_CACHE),"
        self.subject.world.agree(what, digest.hexdigest())

    def _of_all(self, answers: list[T], mine: dict[int, T]) -> list[T]:
        """With several ranks each answers its share, and all get all: lm-eval sees one process."""
        for found in self.subject.world.all(list(mine.items())):
            for index, answer in found:
                answers[index] = answer
        return answers

    @torch.no_grad()
    def _hidden(self, rows: Sequence[Row]) -> Iterator[tuple[Text, torch.Tensor]]:
        """Each input and its hidden states (L, D) that predict. Rows are padded on the right."""
        ids_BL, real_BL = padded([row.ids for row in rows], self.subject.device)
        branches_BL = None
        if any(len(row.texts) > 1 for row in rows):
            branches_BL, _ = padded([row.branches for row in rows], self.subject.device)
        with self.subject.autocast():
            hidden_BLD = self.model.hidden_states(ids_BL, real_BL, branches=branches_BL)
        for row, hidden_LD in zip(rows, hidden_BLD, strict=True):
            for ids, places in zip(row.texts, row.places, strict=True):
                yield ids, hidden_LD[places]

    @torch.no_grad()
    def _score(self, hidden_LD: torch.Tensor, scored: list[int]) -> tuple[float, bool]:
        scored_N = torch.tensor(scored[-len(hidden_LD) :], device=hidden_LD.device)
        with self.subject.autocast():
            logits_NV = self.model.decoder.head(hidden_LD[-len(scored_N) :])
        logs_NV = logits_NV.float().log_softmax(-1)
        total = float(logs_NV.gather(1, scored_N[:, None]).sum())
        return total, bool((logs_NV.argmax(-1) == scored_N).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests with the same settings are decoded together, short prompts first."""
        self._agree(request.args for request in requests)
        texts: list[str] = [""] * len(requests)
        world, mine = self.subject.world, dict[int, str]()
        hidden = disable_tqdm or not errors.is_terminal
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(index)
        for indices in alike.values():
            options = Generation(requests[indices[0]].args[1])
            room = options.room(self.max_length)
            whole = {
                index: self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in indices
            }
            if too_long := [len(ids) for ids in whole.values() if len(ids) > room]:
                log.warning(
                    f"{len(too_long)} of {len(whole)} requests lose their beginning: the longest has "
                    f"{max(too_long)} tokens, and the model's context of {self.max_length} leaves {room} "
                    f"beside {options.new_tokens} new ones"
                )
            own = indices[world.data_rank :: world.data_size]
            prompts = {index: whole[index][-room:] for index in own}
            done = self._complete(prompts, options)
            shown = track(
                done, "decoding", total=len(prompts), console=errors, disable=hidden, transient=True
            )
            for index, text in shown:
                mine[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return self._of_all(texts, mine)

    def _complete(self, prompts: dict[int, list[int]], options: Generation) -> Iterator[tuple[int, str]]:
        with self.subject.autocast():
            for index, row in complete(
                self.model,
                self.codec,
                prompts,
                max_new_tokens=options.new_tokens,
                sampling=options.sampling,
                stop=options.stop,
                batch_size=self.batch_size,
                parallel_prefill=False,
            ):
                yield index, row.text


class Generation:
    """lm-eval's keyword arguments of a generation, in the toolkit's terms. Raises ValueError for what cannot
    be heeded: the texts would be others than the task asks for."""

    def __init__(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if name not in OPTIONS:
                raise ValueError(f"generation_kwargs: {name} = {value!r}: must be of {', '.join(OPTIONS)}")
        if given.get("num_beams") not in (None, 1):
            raise ValueError(f"generation_kwargs: num_beams = {given['num_beams']!r}: must be 1")
        until = given.get("until") or []
        self.stop = [until] if isinstance(until, str) else [text for text in until if text]
        limits = (given[name] for name in LIMITS if given.get(name) is not None)
        self.new_tokens = int(next(limits, MAX_NEW_TOKENS))
        temperature = float(given.get("temperature") or 0.0)
        sampled = temperature > 0 if given.get("do_sample") is None else given["do_sample"]
        if sampled and temperature == 0:  # as lm-eval's Hugging Face model, which does not choose one either
            raise ValueError("generation_kwargs: temperature = 0: must be more than 0 with do_sample = True")
        self.sampling = Sampling(
            temperature=temperature if sampled else 0.0,
            top_k=(given.get("top_k") or None) if sampled else None,  # 0 is none, as in transformers
            top_p=given.get("top_p") if sampled else None,
            seed=0,
        )

    def room(self, context: int) -> int:
        """Tokens that a prompt may have."""
        if self.new_tokens >= context:
            raise ValueError(f"max_gen_toks = {self.new_tokens}: must be less than the context of {context}")
        return context - self.new_tokens


def check_request(request: Instance, context: int) -> None:
    """Raises ValueError for what a model of this context cannot answer."""
    if request.request_type == "generate_until":
        Generation(request.args[1]).room(context)
    elif request.request_type == "loglikelihood":
        before, scored = request.args[:2]
        if not scored and before == before.rstrip():  # lm-eval scores whitespace that a context ends with
            raise ValueError(f"the continuation of {before!r} is empty: there is nothing to score")


def main() -> None:
    """lm-eval's own command line, with this model among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
