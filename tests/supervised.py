"""A recurrence that adds to the loss of a training step, written as a user would."""

from dataclasses import dataclass

from lattice import register
from lattice.protocols import Pass, Recurrence, Unroll, Unrolled


@register("recurrence", "test_supervised")
@dataclass(frozen=True, kw_only=True)
class Supervised(Recurrence):
    """The hidden state is added to the input, and the layers run again; both passes predict."""

    weight: float = 0.5
    penalty: float = 0.1

    def passes(self, shape, *, training):
        head = 2 * shape.hidden_size * shape.vocab_size
        return [Pass(operations=head if training else 0), Pass()]

    def build(self, shape):
        return BothPredict(self)


class BothPredict(Unroll):
    def __init__(self, options):
        self.options = options

    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        token_BL1D = stack.embed(ids_BL).unsqueeze(2)
        first_BL1D = stack.run(token_BL1D, cache=cache)
        last_BL1D = stack.run(token_BL1D + first_BL1D, cache=None if cache is None else cache.of_pass(1))
        return Unrolled(
            last_BL1D.squeeze(2),
            also_predict=[(first_BL1D.squeeze(2), self.options.weight)],
            penalty_BL=self.options.penalty * last_BL1D.squeeze(2).square().mean(-1),
        )
