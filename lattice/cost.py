"""What components declare of their cost; lattice.ledger adds it up.

Operations are floating point operations of matrix products, a multiplication and an addition counted as two;
attention counts all pairs of slots that a pass brings together, masked ones too (the convention of PaLM,
arXiv 2204.02311, appendix B, and of torch's FlopCounterMode).

Shapes: B batch, L tokens, n stages a token, D hidden, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Of one layer, taken apart as lattice.decoder.Block is."""

    project: int
    """Operations a slot to make queries, keys and values."""
    local: int
    """Operations a slot past attention, on the layer's input."""
    finish: int
    """Operations a slot from attention to the layer's output."""
    attention: int
    """Operations a query and key that meet: 4 H E."""
    cached: int
    """Numbers that a slot leaves in a cache: 2 G E."""
    wide: tuple[int, int, int]
    """Of project, local and finish, the operations of products with more outputs than inputs."""
    last: int
    """Of finish, the operations of the product that the layer ends with: nothing in the layer's own backward
    pass needs its result."""

    @property
    def to_last(self) -> LayerCost:
        """All but the last product."""
        return replace(self, finish=self.finish - self.last)

    @property
    def wide_alone(self) -> LayerCost:
        """The wide products and nothing else."""
        project, local, finish = self.wide
        return replace(self, project=project, local=local, finish=finish, attention=0)


def wide(*products: tuple[int, int]) -> int:
    """Operations a slot of those products, each (inputs, outputs), that have more outputs than inputs."""
    return sum(2 * inputs * outputs for inputs, outputs in products if outputs > inputs)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A pass of every token through the layers, as the ledger counts it: the arguments of `Stack.run`."""

    stages: int = 1
    """Slots of each token."""
    read: int | None = None
    """Stages that are read of the last layer; all if not given."""
    fixed: int = 0
    """Leading stages that `Stack.fixed` gave, where a pass before this one had them too."""
    keys: int | None = None
    """Slots of each token whose keys are looked at, through a cache; those of this pass if not given."""
    layers: int | None = None
    """All if not given."""
    part: int | None = None
    """Tokens of each part, where they go through the layers in parts (`Stack.part`); all if not given."""
    times: float = 1.0
    """How often, in the mean over the draws."""
    gradients: bool = True
    """Whether a training step goes back through it."""
    operations: float = 0
    """What the recurrence itself does with a token after this pass, such as a mixture of embeddings."""

    def token_passes(self, num_layers: int) -> float:
        """Slots through all layers, a token."""
        layers = num_layers if self.layers is None else self.layers
        return self.times * self.stages * layers / num_layers

    def runs(self, length: int) -> float:
        """How often the layers run in all, in the mean over the draws."""
        return self.times * (1 if self.part is None else math.ceil(length / self.part))

    def _keys_of_a_token(self, length: int) -> float:
        """Tokens that one meets, in the mean: all, or those up to the end of its part."""
        if (part := self.part) is None:
            return length
        return sum(min(at - at % part + part, length) for at in range(length)) / length

    def layer_operations(self, cost: LayerCost, num_layers: int, length: int) -> float:
        """Forward operations a token, of one such pass over `length` tokens."""
        layers = num_layers if self.layers is None else self.layers
        if not layers:
            return 0.0
        read = self.stages if self.read is None else self.read
        keys = self.stages if self.keys is None else self.keys
        attention = cost.attention * self.stages * keys * self._keys_of_a_token(length)
        alone = cost.project * self.stages + cost.local * self.stages
        total = layers * (alone + attention + cost.finish * self.stages)
        total -= (cost.local + cost.finish) * (self.stages - read)  # the last layer
        if not read:
            total -= attention
        if layers > 1:
            total -= (cost.project + cost.local) * self.fixed  # the first layer
        return total
