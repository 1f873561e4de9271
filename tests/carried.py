"""A recurrence that is computed token by token in training, too, written as a user would."""

from dataclasses import dataclass

import torch

from lattice import register
from lattice.protocols import Pass, Recurrence, Unroll, Unrolled


@register("recurrence", "test_carried")
@dataclass(frozen=True, kw_only=True)
class Carried(Recurrence):
    """A mean of the hidden states of a document so far is added to the next token's input."""

    rows_may_branch = False

    def passes(self, shape, *, training):
        return [Pass(part=1)]

    def build(self, shape):
        return CarriedUnroll()


class CarriedUnroll(torch.nn.Module, Unroll):
    def __init__(self):
        super().__init__()
        self.keep = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, stack, ids_BL, *, draw=None, cache=None):
        cache = stack.cache() if cache is None else cache
        columns = []
        for at in range(ids_BL.shape[1]):
            token = stack.part(slice(at, at + 1))
            token_B11D = token.embed(ids_BL[:, at : at + 1]).unsqueeze(2)
            mean_B11D = self._before(token, cache, torch.zeros_like(token_B11D))
            hidden_B11D = token.run(token_B11D + mean_B11D, cache=cache)
            after_B11D = self.keep * mean_B11D + (1 - self.keep) * hidden_B11D
            if token.real_BL is not None:
                after_B11D = torch.where(token.real_BL[:, :, None, None], after_B11D, mean_B11D)
            cache.state["mean"] = after_B11D
            columns.append(hidden_B11D)
        return Unrolled(torch.cat(columns, dim=1).squeeze(2))

    def _before(self, token, cache, zero_B11D):
        """What the token's document has carried this far."""
        mean_B11D = cache.state.get("mean", zero_B11D)
        if token.document_BL is None:
            return mean_B11D
        before_B1 = cache.state.get("document", token.document_BL)
        cache.state["document"] = token.document_BL
        return torch.where((token.document_BL == before_B1)[:, :, None, None], mean_B11D, zero_B11D)
