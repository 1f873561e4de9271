"""What a thought costs, measured: throughput and memory of training, evaluation or decoding.

Several recipes are measured in turn within each repetition, so that a machine that others use too slows all
of them alike. Compare within one call.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track

from lattice import __version__, hardware
from lattice.attention_mask import made_up_documents
from lattice.build import build_model
from lattice.console import console
from lattice.draws import Draw, Most
from lattice.generate import stream
from lattice.hardware import choose_device
from lattice.ledger import Ledger, dearest_step, ledger
from lattice.live_tensors import LiveTensors
from lattice.model import Output
from lattice.options import to_table
from lattice.protocols import Batch, Precision
from lattice.recipe import Recipe
from lattice.run_folder import peak_memory_mib

Mode = Literal["train", "eval", "decode"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    mode: Mode = "train"
    batch: int | None = None
    """Sequences at once; the recipe's micro-batch if not given, one for decoding."""
    length: int | None = None
    """Tokens of a sequence, of the prompt when decoding; the recipe's if not given, and 32 for decoding."""
    new_tokens: int = 32
    """Tokens to decode."""
    warm_up: int = 2
    repetitions: int = 7
    peak_tflops: float | None = None
    """Of this machine, for MFU; that of the GPU if it is known."""

    def __post_init__(self) -> None:
        for name, least in (("repetitions", 1), ("warm_up", 0), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for name in ("batch", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops = {self.peak_tflops}: must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recipe at one thought count."""

    label: str
    thoughts: int
    recipe: Recipe


def bench(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """A row of results for each case, measured in turn; one that does not fit into memory has an `error`."""
    workloads = [Workload(case, options) for case in cases]
    counts = dict.fromkeys(str(case.thoughts) for case in cases)
    shown = f"{options.mode}, {' and '.join(counts)} thoughts"
    rounds = range(options.warm_up + options.repetitions)
    for _ in track(rounds, shown, console=console, transient=True, disable=not console.is_terminal):
        for workload in workloads:
            workload.once()
    for workload in workloads:
        yield workload.row()
    workloads.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Workload:
    """One case, ready to run."""

    def __init__(self, case: Case, options: Options) -> None:
        recipe, decoding = case.recipe, options.mode == "decode"
        run = recipe.run
        self.case, self.options = case, options
        self.device = choose_device(run.device)
        self.precision: Precision = recipe.component("precision")
        self.rows = options.batch or (1 if decoding else run.micro_batch or run.sequences)
        self.length = options.length or (32 if decoding else run.sequence_tokens)
        self.error: str | None = None
        self.seconds: list[dict[str, float]] = []
        self.memory: dict[str, float] = {}
        self._call: Callable[[Clock], None] | None = None
        try:
            self._call = self._ready()
        except torch.OutOfMemoryError as error:
            self._give_up(error)

    def once(self) -> None:
        """One more repetition; those for warming up are left out of the row."""
        if self._call is None:
            return
        clock = Clock(self.device)
        try:
            self._call(clock)
        except torch.OutOfMemoryError as error:
            self._give_up(error)
            return
        self.seconds.append(clock.seconds)

    def _give_up(self, error: torch.OutOfMemoryError) -> None:
        """The row says why; what was built is let go, since the other cases need the memory."""
        self.error, self._call = str(error).splitlines()[0], None
        for part in ("model", "optimizer"):
            vars(self).pop(part, None)

    def _ready(self) -> Callable[[Clock], None]:
        torch.manual_seed(self.case.recipe.run.seed)
        self.model = build_model(self.case.recipe)
        self.precision.apply(self.model)
        self.case.recipe.component("compile").apply(self.model)
        self.model.to(self.device)
        reserved = self.model.recurrence.reserved_ids(self.model.shape)
        free = torch.tensor([row for row in range(self.model.shape.vocab_size) if row not in reserved])
        ids = free[torch.randint(len(free), (self.rows, self.length + 1))]
        ids_BL, targets_BL = ids[:, :-1], ids[:, 1:]
        self.batch = Batch(ids_BL, targets_BL, made_up_documents(self.model.mask, ids_BL))
        if self.options.mode == "train":
            self.optimizer = self.case.recipe.component("optimizer").build(self.model)
            return self._train
        self.model.eval()
        if self.options.mode == "eval":
            return self._evaluate
        tokens, context = self.length + self.options.new_tokens + 1, self.model.shape.context
        if tokens > context:
            raise ValueError(
                f"new_tokens = {self.options.new_tokens}: with a prompt of length = {self.length} and one "
                f"that is not timed these are {tokens} tokens; must be at most the context, {context}"
            )
        return self._decode

    def _train(self, clock: Clock) -> None:
        loss = self._forward(clock, self._draw()).objective
        assert loss is not None
        with clock("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with clock("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _draw(self) -> Draw:
        """The last steps of the training, one a repetition: what thinks more from step to step thinks most
        there, and what draws its iterations takes them as they come. Memory is that of the most."""
        run, done = self.case.recipe.run, len(self.seconds)
        if done == self.options.warm_up + self.options.repetitions:
            return Most(run.seed, dearest_step(self.case.recipe))
        return Draw(run.seed, self._step(done))

    def _step(self, done: int) -> int:
        return max(0, self.case.recipe.run.steps - 1 - done)

    @torch.no_grad()
    def _evaluate(self, clock: Clock) -> None:
        self._forward(clock)

    def _forward(self, clock: Clock, draw: Draw | None = None) -> Output:
        with clock("data"):
            batch = self.batch.to(self.device)
        with clock("forward"), self.precision.autocast(self.device):
            output: Output = self.model(
                batch.ids_BL, documents=batch.documents_BL, targets=batch.targets_BL, draw=draw
            )
        return output

    def _decode(self, clock: Clock) -> None:
        with clock("data"):
            ids_BL = self.batch.ids_BL.to(self.device)
        # The first token comes from the prompt alone, each after it from a step.
        tokens_B1 = stream(self.model, ids_BL, self.options.new_tokens + 1)
        with self.precision.autocast(self.device):
            with clock("prefill"):
                next(tokens_B1)
            with clock("forward"):
                deque(tokens_B1, maxlen=0)

    def row(self) -> dict[str, Any]:
        """Medians with quartiles, the ledger's costs, and on what it was measured."""
        options, recipe = self.options, self.case.recipe
        decoding = options.mode == "decode"
        # The tokens that are decoded stand one after the other behind the prompt: on average, there.
        length = self.length + (options.new_tokens + 1) // 2 * decoding
        costs = ledger(
            recipe,
            length=length,
            steps=[self._step(options.warm_up + number) for number in range(options.repetitions)],
        )
        row: dict[str, Any] = {
            "recipe": self.case.label,
            "mode": options.mode,
            "thoughts": self.case.thoughts,
            "batch": self.rows,
            "length": self.length,
            "precision": to_table(self.precision)["kind"],
            "hardware": hardware.describe(self.device),
            "versions": {
                "lattice": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "warm_up": options.warm_up,
            "repetitions": options.repetitions,
            "ledger": asdict(costs),
        }
        if self._call is None:
            return {**row, "error": self.error}
        row |= self._peaks()
        measured = self.seconds[options.warm_up :]
        row["seconds"] = {part: statistics.median(one[part] for one in measured) for part in measured[0]}
        timed = [part for part in measured[0] if part != "prefill"]
        tokens = self.rows * (options.new_tokens if decoding else self.length)
        rates = [tokens / sum(one[part] for part in timed) for one in measured]
        row["tokens_per_second"] = _spread(rates)
        passes, operations = _of_mode(costs, options.mode)
        rate = row["tokens_per_second"]["median"]
        row["token_passes_per_second"] = rate * passes
        row["operations_per_token"] = operations
        row["operations_per_second"] = rate * operations
        given = options.peak_tflops
        peak = hardware.peak_of(self.device) if given is None else given * 1e12
        row["mfu"] = None if peak is None else row["operations_per_second"] / peak
        return row

    def _peaks(self) -> dict[str, float]:
        """One more repetition, its memory followed, without what the other cases hold; it is slower, so that
        its time is not counted."""
        assert self._call is not None
        clock = Clock(self.device)
        state = self.optimizer.state.values() if self.options.mode == "train" else ()
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [value for one in state for value in one.values() if isinstance(value, torch.Tensor)]
        live = LiveTensors(held)
        if self.device.type == "cuda":
            of_others = torch.cuda.memory_allocated(self.device) - live.live
            torch.cuda.reset_peak_memory_stats(self.device)
            self._call(clock)
            peak = torch.cuda.max_memory_allocated(self.device) - of_others
            return {"peak_memory_mib": peak / 2**20}
        process = _ProcessPeak()
        with live:
            self._call(clock)
        return {"peak_memory_mib": live.peak / 2**20, "peak_process_mib": process.mib()}


class Clock:
    """Seconds by part; on a GPU each part ends when its kernels have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[part] = time.perf_counter() - start


class _ProcessPeak:
    """Largest resident size of this process since now; since its start where that cannot be reset."""

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def mib(self) -> float:
        try:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            return int(status.split("VmHWM:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            return peak_memory_mib(torch.device("cpu"))


def _of_mode(costs: Ledger, mode: Mode) -> tuple[float, float]:
    """Token-passes and operations a token."""
    if mode == "train":
        return costs.training_token_passes, costs.training_operations
    if mode == "eval":
        return costs.evaluation_token_passes, costs.evaluation_operations
    return costs.inference_token_passes, costs.inference_operations


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return {"low": values[0], "median": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}
