"""A user's recurrence, brought by `imports`: PonderLM with the mixtures that every layer predicts, summed."""

from dataclasses import dataclass

from lattice.protocols import Pass, Recurrence, Unroll, Unrolled
from lattice.registry import register


@register("recurrence", "layer_mixture")
@dataclass(frozen=True, kw_only=True)
class LayerMixture(Recurrence):
    """Mixtures of embeddings that every layer predicts, added to the input, pass after pass."""

    steps: int = 3

    def passes(self, shape, *, training):
        mixing = 4 * shape.hidden_size * shape.vocab_size * shape.num_layers
        return [Pass(times=self.steps, operations=mixing), Pass()]

    def build(self, shape):
        return Mixing(self.steps)


class Mixing(Unroll):
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, stack, ids_BL, *, draw=None, cache=None):
        input_BL1D = stack.embed(ids_BL).unsqueeze(2)
        for index in range(self.steps + 1):
            keys = None if cache is None else cache.of_pass(index)
            state, mixture = input_BL1D, 0
            for layer in range(stack.num_layers):
                last = layer == stack.num_layers - 1
                state = stack.run(state, start=layer, stop=layer + 1, norm=last, cache=keys)
                if index < self.steps:
                    mixture = mixture + stack.logits(state).softmax(dim=-1) @ stack.table_VD
            input_BL1D = input_BL1D + mixture
        return Unrolled(state.squeeze(2))
