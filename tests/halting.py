"""A recurrence that learns for each token when to halt, written as a user would."""

import dataclasses
from dataclasses import dataclass

import torch

from lattice import register
from lattice.protocols import Pass, Recurrence, Unroll, Unrolled


@register("recurrence", "test_halting")
@dataclass(frozen=True, kw_only=True)
class Halting(Recurrence):
    """Passes over the hidden states, each of which predicts, weighted by the probability that a token halts
    there (PonderNet, arXiv 2107.05407, section 2). All are taken at evaluation; the last one predicts."""

    steps: int = 2
    prior: float = 0.3
    """Probability of halting at each step that the learned ones are drawn to."""
    divergence: float = 0.01
    """Weight of the divergence from it."""

    def passes(self, shape, *, training):
        step = Pass(operations=2 * shape.hidden_size)
        if not training:
            return [Pass()] * self.steps
        head = 2 * shape.hidden_size * shape.vocab_size
        halting = dataclasses.replace(step, operations=step.operations + head)
        return [halting] * (self.steps - 1) + [Pass(operations=head)]

    def with_thoughts(self, count):
        return dataclasses.replace(self, steps=count + 1)

    def build(self, shape):
        return HaltingUnroll(self, shape.hidden_size)


class HaltingUnroll(torch.nn.Module, Unroll):
    def __init__(self, options, hidden_size):
        super().__init__()
        self.options = options
        self.halt = torch.nn.Linear(hidden_size, 1)

    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        options, training = self.options, draw is not None
        token_BL1D = stack.embed(ids_BL).unsqueeze(2)
        hidden_BL1D, predict = None, []
        going_on_BL, penalty_BL, expected_BL = 1.0, 0.0, 0.0
        for number in range(options.steps):
            keys = None if cache is None else cache.of_pass(number)
            given_BL1D = token_BL1D if hidden_BL1D is None else token_BL1D + hidden_BL1D
            hidden_BL1D = stack.run(given_BL1D, cache=keys)
            if not training:
                continue
            last, hidden_BLD = number == options.steps - 1, hidden_BL1D.squeeze(2)
            halts_BL = 1.0 if last else torch.sigmoid(self.halt(hidden_BLD).squeeze(-1).float())
            share_BL = going_on_BL * halts_BL
            prior = (1 - options.prior) ** number * (1.0 if last else options.prior)
            penalty_BL = penalty_BL + options.divergence * share_BL * torch.log(share_BL / prior)
            expected_BL = expected_BL + (number + 1) * share_BL
            # The last hidden state has the whole of its loss already.
            predict.append((hidden_BLD, share_BL - 1 if last else share_BL))
            going_on_BL = going_on_BL * (1 - halts_BL)
        if not training:
            return Unrolled(hidden_BL1D.squeeze(2))
        return Unrolled(
            hidden_BL1D.squeeze(2),
            telemetry={"expected_steps": expected_BL.mean()},
            also_predict=predict,
            penalty_BL=penalty_BL,
        )
