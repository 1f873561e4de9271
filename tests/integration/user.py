"""Components that only these tests need; a recipe imports them as it would a user's."""

import os
import random
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lattice.components.data.embedded import Embedded
from lattice.components.loss.cross_entropy import CrossEntropy
from lattice.components.recurrence.none import NoRecurrence, OnePass
from lattice.protocols import Evaluator, Metrics, MetricWriter, Optimizer, Unrolled
from lattice.registry import register


@register("metrics", "test_signal")
@dataclass(frozen=True, kw_only=True)
class SignalAt(Metrics):
    """Sends this process a signal once the loss of a step is logged."""

    step: int = 0
    name: str = "SIGTERM"
    sleep: float = 0.0

    def build(self, folder, first_step):
        return SignalWriter(self)


class SignalWriter(MetricWriter):
    def __init__(self, options):
        self.options = options

    def log(self, step, values):
        time.sleep(self.options.sleep)
        if step == self.options.step and "loss" in values:
            os.kill(os.getpid(), getattr(signal, self.options.name))

    def close(self):
        pass


@register("evaluator", "test_logits")
@dataclass(frozen=True, kw_only=True)
class Logits(Evaluator):
    """Writes the live model's logits, one file a call."""

    folder: str
    every: int = 0

    @torch.no_grad()
    def evaluate(self, subject):
        folder = Path(self.folder)
        folder.mkdir(exist_ok=True)
        logits = subject.model(torch.arange(16)[None]).logits
        save_file({"logits": logits}, folder / f"{len(list(folder.iterdir()))}.safetensors")
        return {}


@register("evaluator", "test_failing")
@dataclass(frozen=True, kw_only=True)
class Failing(Evaluator):
    """Cannot evaluate before a file is there."""

    file: str
    every: int = 0

    def evaluate(self, subject):
        if not Path(self.file).exists():
            raise ValueError(f"'{self.file}' is not there")
        return {"done": 1.0}


@register("recurrence", "test_telemetry")
@dataclass(frozen=True, kw_only=True)
class Logging(NoRecurrence):
    """The plain model, logging something under a name, which says what."""

    name: str

    def build(self, shape):
        return LoggingPass(self)


class PassWithOptions(OnePass):
    def __init__(self, options):
        self.options = options


class LoggingPass(PassWithOptions):
    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        hidden = super().__call__(stack, ids_BL, draw=draw, cache=cache).hidden_BLD
        values = {"count": 3, "flag": True, "bits": torch.tensor([True, False]), "list": [1.0]}
        return Unrolled(hidden, {self.options.name: values.get(self.options.name, torch.tensor(1.0))})


@register("recurrence", "test_not_finite")
@dataclass(frozen=True, kw_only=True)
class NotFinite(NoRecurrence):
    """The plain model, but for one step whose loss or gradient is no number."""

    step: int
    what: str = "loss"

    def build(self, shape):
        return NotFinitePass(self)


class NotFinitePass(PassWithOptions):
    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        hidden = super().__call__(stack, ids_BL, draw=draw, cache=cache).hidden_BLD
        if draw is None or draw.step != self.options.step - 1:
            return Unrolled(hidden)
        if self.options.what == "loss":
            return Unrolled(hidden * float("nan"))
        hidden.register_hook(lambda gradient: gradient * float("inf"))
        return Unrolled(hidden)


@register("recurrence", "test_noise")
@dataclass(frozen=True, kw_only=True)
class Noise(NoRecurrence):
    """The plain model, with noise from the global generator in training."""

    def build(self, shape):
        return NoisePass()


class NoisePass(OnePass):
    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        hidden = super().__call__(stack, ids_BL, draw=draw, cache=cache).hidden_BLD
        noise = 0 if draw is None else 0.1 * torch.randn(hidden.shape[-1])
        return Unrolled(hidden + noise, {"residuals": torch.ones(1 if draw is None else 1 + draw.step % 3)})


@register("data", "test_wrong")
@dataclass(frozen=True, kw_only=True)
class Wrong(Embedded):
    """Batches that are not as they were asked for, from the second step on."""

    how: str = "short"

    def open(self, request):
        source = super().open(request)
        source.steps = partial(self._steps, source.steps)
        return source

    def _steps(self, right, first):
        batches = right(first)
        yield next(batches)
        for step in batches if self.how != "ended" else ():
            change = {
                "short": lambda batch: replace(batch, ids_BL=batch.ids_BL[:, 1:]),
                "int32": lambda batch: replace(batch, targets_BL=batch.targets_BL.int()),
                "ignored": lambda batch: replace(batch, targets_BL=torch.full_like(batch.targets_BL, -100)),
            }[self.how]
            yield [change(batch) for batch in step]


GIVEN = {"tensor": torch.tensor(1.0), "list": [1.0], "none": None, "number": 1.0}


@register("evaluator", "test_drawing")
@dataclass(frozen=True, kw_only=True)
class Drawing(Evaluator):
    """Draws from the global generators, and gives something."""

    gives: str = "number"
    every: int = 0

    def evaluate(self, subject):
        torch.rand(3), random.random()
        return {"figure": GIVEN[self.gives]}


@register("optimizer", "test_keeping")
@dataclass(frozen=True, kw_only=True)
class Keeping(Optimizer):
    """Draws each weight towards a slow copy of itself, which starts as the weight when the first gradient
    comes, and makes it smaller whatever the learning rate; its state differs between matrices and others."""

    lr: float = 1e-2
    grad_clip: float = 1.0
    decay: float = 0.0
    spoils: int = 0

    def build(self, model):
        return SlowCopies(model.parameters(), {"lr": self.lr, "decay": self.decay, "spoils": self.spoils})


class SlowCopies(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        for one in (one for one in group["params"] if one.grad is not None):
            name, state = "matrix" if one.dim() > 1 else "other", self.state[one]
            state["count"] = state.get("count", torch.zeros(())) + 1
            slow = state.setdefault(name, one.detach().clone())
            one -= group["lr"] * one.grad + 0.1 * (one - slow)
            one *= 1 - group["decay"]
            if int(state["count"]) == group["spoils"]:
                one *= float("nan")


@register("optimizer", "test_adafactor")
@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Its step reads values."""

    lr: float = 1e-2
    grad_clip: float = 1.0

    def build(self, model):
        return torch.optim.Adafactor(model.parameters(), lr=self.lr)


@register("loss", "test_doubled")
@dataclass(frozen=True, kw_only=True)
class Doubled(CrossEntropy):
    """No cross entropy, though made of it."""

    def total(self, hidden_ND, head, targets_N, weights_N=None):
        total, count = super().total(hidden_ND, head, targets_N, weights_N)
        return 2 * total, count


@register("recurrence", "test_late")
@dataclass(frozen=True, kw_only=True)
class Late(NoRecurrence):
    """Has a matrix and a number of its own that come in at a later step; reads a value as it is built."""

    first: int = 6

    def build(self, shape):
        return LatePass(self, shape)


class LatePass(PassWithOptions, nn.Module):
    def __init__(self, options, shape):
        nn.Module.__init__(self)
        self.options = options
        self.matrix = nn.Parameter(torch.eye(shape.hidden_size))
        self.number = nn.Parameter(torch.linspace(0, 1, 3)[-1:].tolist()[0] * torch.ones(()))

    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        hidden = OnePass.__call__(self, stack, ids_BL, draw=draw, cache=cache).hidden_BLD
        on = draw is None or draw.step >= self.options.first
        return Unrolled(hidden @ self.matrix * self.number if on else hidden)


@register("optimizer", "test_descent")
@dataclass(frozen=True, kw_only=True)
class Descent(Optimizer):
    """Gradient descent that counts its steps in its groups, and goes faster along vectors."""

    lr: float = 1e-2
    grad_clip: float = 1.0
    faster: float = 10.0
    holds: str = "tensor"

    def build(self, model):
        matrices = [one for one in model.parameters() if one.dim() > 1]
        vectors = [one for one in model.parameters() if one.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "lr": self.faster * self.lr}]
        return CountingDescent(groups, {"lr": self.lr, "count": 0, "pair": (1, 2), "holds": self.holds})


class CountingDescent(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for one in group["params"]:
                if one.grad is not None:
                    held = torch.zeros(()) if group["holds"] == "tensor" else 0
                    self.state[one].setdefault("held", held)
                    one -= group["lr"] / group["count"] * one.grad
