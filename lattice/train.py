"""Training: one readable loop, side effects in a fixed order.

A step: forward and backward over its micro-batches, check, clip, update, log, evaluate, save. Whatever a
step does follows from the recipe, the weights before it and its number, so that a run which was
interrupted and resumed computes the same as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from lattice import atomic, hardware, preflight, run_folder, state, user_code
from lattice.arrangement import together
from lattice.assemble import TrainingGraph, training_graph
from lattice.console import Training, only_first, say
from lattice.draws import Draw
from lattice.figures import figures
from lattice.hardware import choose_device, deterministic
from lattice.interrupts import StopRequest
from lattice.launch import Agreed, Launch
from lattice.model import AUXILIARY
from lattice.protocols import Batch, MetricWriter, kind_of
from lattice.rank_log import RankLog
from lattice.recipe import Recipe, RecipeError, load_recipe
from lattice.sharded import clip_gradients
from lattice.watch import Watch
from lattice.world import World, joined


class NonFiniteLoss(Agreed):
    """The loss or a gradient is no number; nothing was updated with it."""


class NonFiniteWeights(Agreed):
    """A weight is no number; nothing was saved with it."""


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    overrides: list[str] | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Trains as the recipe says, or goes on where an interrupted run in `out` stopped.

    `out` is the run's directory, `runs/<recipe name>` if not given. Launched by torchrun, all its processes
    call this. Returns the content of summary.json; a run that was asked to stop (SIGINT, SIGTERM, SIGHUP)
    returns `{"stopped_at": step, …}`. Raises RecipeError for what is wrong with the recipe, ValueError and
    OSError for what goes wrong on the way, with the last good checkpoint named.
    """
    recipe = load_recipe(recipe, overrides or [])
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    launch = Launch.here()
    world = World(launch, together=together(recipe, launch.size))
    device = choose_device(recipe.run.device, launch=launch)
    with (
        only_first(launch.rank),
        deterministic(recipe.run.deterministic),
        joined(world, device, recipe.run.timeout),
    ):
        world.agree("the resolved recipe", recipe.to_toml())
        world.agree("the code that 'imports' names", user_code.digest(recipe.imports))
        return _train(recipe, folder, world, device)


def _train(recipe: Recipe, folder: Path, world: World, device: torch.device) -> dict[str, Any]:
    finished = world.from_first(lambda: _finished(folder, recipe))
    if finished is not None:
        return finished
    checkpointer = recipe.component("checkpoint").build(folder / run_folder.CHECKPOINTS)
    fresh = checkpointer.latest() is None
    gathered_fits = world.from_first(lambda: preflight.check(recipe, fresh=fresh, world=world, device=device))
    with ExitStack() as stack:
        world.from_first(lambda: stack.enter_context(run_folder.locked(folder)))
        world.from_first(lambda: run_folder.check_same(folder, recipe))
        log = stack.enter_context(RankLog(folder, world))
        graph = training_graph(
            recipe,
            folder,
            checkpointer=checkpointer,
            world=world,
            device=device,
            gathered_fits=gathered_fits,
        )
        world.from_first(lambda: preflight.check_evaluators(recipe, graph.subject(0)))
        torch.manual_seed(recipe.run.seed)
        resumed = state.resume(graph) or {"step": 0, "seconds": 0.0}
        if resumed["step"] > recipe.run.steps:
            raise RecipeError(
                [
                    f"run.steps = {recipe.run.steps}: the run in '{folder}' has taken {resumed['step']} "
                    "already; must be at least that, or choose another directory with --out"
                ]
            )
        if resumed["step"]:
            say(f"resuming '{folder}' after step {resumed['step']}{_prolonged(resumed, recipe)}")
        # Only now: a recipe whose parts do not fit leaves no run behind, and none as it was.
        world.from_first(lambda: run_folder.open_run(folder, recipe))
        parameters = sum(parameter.numel() for parameter in graph.model.parameters())
        ranks = f"{world.size} ranks, the first on " if world.size > 1 else ""
        for line in recipe.dropped:
            say(f"note: {line}")
        say(f"{parameters:,} parameters on {ranks}{graph.device}; the run's directory is '{folder}'")
        log.event("ready", step=resumed["step"])
        watch = stack.enter_context(Watch(folder, world, recipe.run.timeout, log).on())
        try:
            return Loop(graph, resumed, watch).run()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                "a process that reads data ended unexpectedly, perhaps for lack of memory: the same command "
                f"goes on from the last checkpoint in '{folder}', with fewer data.workers if need be"
            ) from error


def _finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of a run that has already taken all its steps."""
    if not (folder / run_folder.SUMMARY).is_file():
        return None
    run_folder.check_same(folder, recipe)
    summary = run_folder.finished(folder, recipe.run.steps)
    if summary is not None:
        taken = summary["steps"]
        say(f"'{folder}' has taken all its {taken} steps; to train anew choose another one with --out")
    return summary


def _prolonged(resumed: Mapping[str, Any], recipe: Recipe) -> str:
    """What is said of a run that is given another number of steps than it had."""
    before = resumed.get("steps", recipe.run.steps)
    if before == recipe.run.steps:
        return ""
    ended = ", where it had ended" if resumed["step"] == before else ""
    return (
        f"{ended}: with {recipe.run.steps} steps in place of {before} its learning rate follows another "
        "schedule from here on"
    )


class Loop:
    """One part of a run, from a checkpoint or the start to the end or an interruption."""

    def __init__(self, graph: TrainingGraph, before: Mapping[str, Any], watch: Watch) -> None:
        self.graph = graph
        self.watch = watch
        self.run_options = graph.recipe.run
        self.first: int = before["step"]
        self.started = time.perf_counter() - before["seconds"]
        self.peak_before: float = before.get("peak_memory_mib", 0.0)
        self.earlier_ends: list[list[int]] = list(before.get("earlier_ends", []))
        """Where the run was given another number of steps: after which step, and how many it had until then.
        Its learning rate did not follow one schedule."""
        if before.get("steps", self.run_options.steps) != self.run_options.steps:
            self.earlier_ends.append([self.first, before["steps"]])
        self.results: dict[str, dict[str, float | str]] = {}

    def run(self) -> dict[str, Any]:
        graph, options = self.graph, self.run_options
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            stack.push(self._wait)
            self._open_logs(stack)
            shown = stack.enter_context(Training(self.first, options.steps, options.log_every))
            steps = graph.source.steps(self.first)
            graph.model.train()
            if self.first:
                self._evaluate(self.first, shown, self._evaluated())
            for done in range(self.first + 1, options.steps + 1):
                self.watch.at(done, "data")
                row = self._step(done, next(steps, []))
                if done == self.first + 1:
                    state.check_state(graph)
                self.watch.at(done, "log")
                self._log(row)
                shown.step(row)
                due = done % graph.checkpoint_every == 0 or done == options.steps
                if due:  # before an evaluation, which may fail
                    self._save(done)
                self._evaluate(done, shown)
                self.watch.at(done, "log")
                stopping = self._agreed(stop)
                if stopping and not due:
                    self._save(done)
                graph.checkpointer.poll()
                if stopping and done < options.steps:
                    return self._stopped(done, stopping)
        return self._summary()

    def _wait(self, kind: type[BaseException] | None, *_: object) -> None:
        """For the save in flight. After a failure among others no longer than a rank may keep them waiting:
        one without which the save cannot end may be gone."""
        if kind is None or self.graph.world.size == 1:
            self._saved()
        else:
            waiting = threading.Thread(target=self._saved_or_not, name="last save", daemon=True)
            waiting.start()
            waiting.join(self.run_options.timeout)

    def _saved(self) -> None:
        """What has been started is on disk, however long that takes."""
        self.watch.then("checkpoint")
        self.graph.checkpointer.wait()

    def _saved_or_not(self) -> None:
        with suppress(Exception):  # of two failures the first is the one to tell
            self._saved()

    def _agreed(self, stop: StopRequest) -> str | None:
        """The signal that some rank has received: all stop after the same step."""
        asked = self.graph.world.gather([stop.number])
        return max((signal.Signals(int(number)).name for (number,) in asked if number), default=None)

    def _step(self, done: int, batches: list[Batch]) -> dict[str, Any]:
        """Takes step number `done` (from 1) and returns its line of metrics."""
        graph, start = self.graph, time.perf_counter()
        factor = graph.schedule.factor(done - 1, self.run_options.steps)
        for group, built in zip(graph.optimizer.param_groups, graph.built_groups, strict=True):
            group["lr"] = built["lr"] * factor
        losses, telemetry = self._forward_backward(done, batches)
        self.watch.at(done, "update")
        limit = math.inf if graph.grad_clip is None else graph.grad_clip
        grad_norm = clip_gradients(graph.model.parameters(), limit)
        loss = sum(losses) / graph.spread.copies
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._non_finite(done, losses, grad_norm, batches)
        graph.optimizer.step()
        graph.optimizer.zero_grad()
        tokens = self.run_options.batch_tokens
        row = {
            "step": done,
            "tokens": done * tokens,
            "loss": loss,
            "lr": graph.peak_lr * factor,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }
        return {**row, **telemetry}

    def _forward_backward(self, done: int, batches: list[Batch]) -> tuple[list[float], dict[str, Any]]:
        """Each rank's part of the mean loss over the targets of all micro-batches of all ranks, and the mean
        of their telemetry."""
        graph, world = self.graph, self.graph.world
        draw = Draw(self.run_options.seed, done - 1)
        count = self._targets(done, batches)
        losses, auxiliary, telemetry, passes = [], [], [], 0
        for number, batch in enumerate(batches, 1):
            batch = batch.to(graph.device)
            with graph.spread.micro_batch(last=number == len(batches)):
                self.watch.at(done, "forward")
                with graph.autocast():
                    output = graph.spread(
                        batch.ids_BL, documents=batch.documents_BL, targets=batch.targets_BL, draw=draw
                    )
                assert output.loss_sum is not None
                assert output.objective_sum is not None
                self.watch.at(done, "backward")
                (output.objective_sum / count).backward()  # type: ignore[no-untyped-call]
            losses.append(output.loss_sum.detach() / count)
            if output.auxiliary_sum is not None:
                auxiliary.append(output.auxiliary_sum.detach() / count)
            telemetry.append(output.telemetry)
            passes += output.passes
        graph.spread.finish()
        mine = [passes, float(sum(losses)), float(sum(auxiliary))]
        passes_R, losses_R, auxiliary_R = zip(*world.gather(mine), strict=True)
        world.same(f"the number of passes in step {done}, {passes} here,", passes_R)
        means = {name: torch.stack([one[name] for one in telemetry]).mean(0) for name in telemetry[0]}
        logged = world.means(means) if means else {}
        if auxiliary:
            logged[AUXILIARY] = sum(auxiliary_R) / graph.spread.copies
        return list(losses_R), logged

    def _targets(self, done: int, batches: list[Batch]) -> float:
        """Of all ranks, which have come to the same step. Raises ValueError for batches that are not as the
        data was asked for."""
        world = self.graph.world
        self._check(done, batches)
        mine = sum(int((batch.targets_BL != -100).sum()) for batch in batches)
        steps_R, counts_R = zip(*world.gather([done, mine]), strict=True)
        world.same("the step", steps_R)
        count: float = sum(counts_R) / world.together
        if not count:
            raise ValueError(f"step {done}: no target counts; the batch: {self._read(batches)}")
        return count

    def _check(self, done: int, batches: list[Batch]) -> None:
        kind, shape = kind_of(self.graph.recipe.component("data")), self.graph.micro_batch
        if not batches:
            raise ValueError(f"data '{kind}': ended before step {done} of {self.run_options.steps}")
        for batch in batches:
            for name in ("ids_BL", "targets_BL"):
                tensor = getattr(batch, name)
                if tensor.shape != shape or tensor.dtype != torch.int64:
                    raise ValueError(
                        f"data '{kind}': {name} of {batch.identity} is {tensor.dtype} of shape "
                        f"{tuple(tensor.shape)}; must be torch.int64 of shape {shape}"
                    )

    @staticmethod
    def _read(batches: list[Batch]) -> str:
        return "; ".join(batch.identity for batch in batches)

    def _non_finite(
        self, done: int, losses: list[float], grad_norm: float, batches: list[Batch]
    ) -> NonFiniteLoss:
        graph = self.graph
        last = self._last_good()
        read = graph.world.all(self._read(batches))
        at_fault = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
        where = "; ".join(f"rank {rank}: {read[rank]}" if len(read) > 1 else read[rank] for rank in at_fault)
        loss = sum(losses) / graph.spread.copies
        return NonFiniteLoss(
            f"step {done}: loss {loss}, gradient norm {grad_norm}: not finite; the weights were not updated. "
            f"The batch: {where}. {last}"
        )

    def _last_good(self) -> str:
        self._saved()
        good = self.graph.checkpointer.latest()
        return f"The last good checkpoint is {good}" if good else "There is no checkpoint yet"

    def _evaluated(self) -> list[str]:
        """The evaluators whose figures of the step that the run goes on from are known."""
        return self.graph.world.from_first(lambda: self._file.evaluated)

    def _evaluate(self, done: int, shown: Training, known: Collection[str] = ()) -> None:
        """Runs the evaluators that are due after this step, but for those whose figures are known."""
        graph, last = self.graph, done == self.run_options.steps
        due = [
            name for name, one in graph.evaluators.items() if last or (one.every and done % one.every == 0)
        ]
        for name in (name for name in due if name not in known):
            self.watch.at(done, "evaluation")
            graph.model.eval()
            with graph.spread.whole():
                self.results[name] = figures(name, graph.evaluators[name], graph.subject(done))
            graph.model.train()
            values = {f"{name}/{key}": value for key, value in self.results[name].items()}
            self._log({"step": done, "tokens": done * self.run_options.batch_tokens, **values})
            shown.evaluation(name, done, self.results[name])

    def _save(self, done: int) -> None:
        self.watch.at(done, "checkpoint")
        self._check_finite(done)
        peak = self._peak_memory_mib()
        if self.graph.world.rank == 0:
            self._file.sync()
        seconds = time.perf_counter() - self.started
        facts = state.facts(
            self.graph,
            done,
            seconds=seconds,
            peak_memory_mib=peak,
            earlier_ends=self.earlier_ends,
        )
        self.graph.checkpointer.save(done, state.tensors(self.graph), facts)

    def _check_finite(self, done: int) -> None:
        """That a checkpoint is one to go on from: an update may spoil what loss and gradient do not show."""
        spoilt_R = self.graph.world.all(state.not_finite(self.graph.model))
        spoilt = list(dict.fromkeys(name for names in spoilt_R for name in names))
        if spoilt:
            raise NonFiniteWeights(
                f"step {done}: after its update {len(spoilt)} parameters are not finite, first {spoilt[0]}; "
                f"nothing was saved. {self._last_good()}"
            )

    def _open_logs(self, stack: ExitStack) -> None:
        """Rank 0 writes what is logged; the numbers are those of all ranks."""
        folder = self.graph.folder
        self._writers: list[MetricWriter] = []
        if self.graph.world.rank:
            return
        finished = self.first == self.run_options.steps
        self._file = run_folder.MetricsFile(folder, self.first, evaluates_again=finished)
        stack.callback(self._file.close)
        for metrics in self.graph.metrics.values():
            self._writers.append(metrics.build(folder, self.first + 1))
            stack.callback(self._writers[-1].close)

    def _log(self, row: dict[str, Any]) -> None:
        if self.graph.world.rank:
            return
        self._file.log(row)
        for writer in self._writers:
            writer.log(row["step"], {key: value for key, value in row.items() if key != "step"})

    def _stopped(self, done: int, received: str) -> dict[str, Any]:
        self._saved()
        say(f"{received}: stopped after step {done} and saved; the same command goes on from there")
        return {"stopped_at": done, "folder": str(self.graph.folder)}

    def _summary(self) -> dict[str, Any]:
        """Written once everything before it is on disk: its presence says that the run is complete."""
        peak = self._peak_memory_mib()
        return self.graph.world.from_first(lambda: self._write_summary(peak))

    def _peak_memory_mib(self) -> float:
        """The most that a rank has taken, in this part of the run or one before."""
        peaks = self.graph.world.gather([run_folder.peak_memory_mib(self.graph.device)])
        return max(self.peak_before, *(peak for (peak,) in peaks))

    def _write_summary(self, peak_memory_mib: float) -> dict[str, Any]:
        graph, options = self.graph, self.run_options
        seconds = time.perf_counter() - self.started
        steps = run_folder.training_steps(graph.folder)
        if not steps:
            raise ValueError(
                f"{graph.folder / run_folder.METRICS} holds no step of a run that has taken {options.steps}: "
                "restore it, or train anew with --out"
            )
        tokens = options.steps * options.batch_tokens
        summary: dict[str, Any] = {
            "steps": options.steps,
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
            "peak_memory_mib": peak_memory_mib,
            "parameters": sum(parameter.numel() for parameter in graph.model.parameters()),
            "provenance": {
                "hardware": hardware.describe(graph.device),
                "ranks": graph.world.size,
                "fingerprints": graph.source.fingerprints,
                "earlier_ends": self.earlier_ends,
            },
        }
        for name, values in self.results.items():
            summary |= {f"{name}_{key}": value for key, value in values.items()}
        content = json.dumps(summary, indent=2) + "\n"
        atomic.write_file(graph.folder / run_folder.SUMMARY, content.encode())
        return summary
