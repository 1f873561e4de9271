"""How many graphs torch.compile may make of one function, what they keep for the backward pass, and where
none is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GRAPHS = 64
"""A layer is one graph for each kind of arguments that a recurrence calls it with: stages, those read, those
given, with and without gradients. Attention with block masks is one for each kind of mask, and for sizes that
torch cannot tell are alike. They do not grow with the number of iterations. torch allows 8."""


def allow_graphs() -> None:
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)


def keep_no_cheap_values() -> None:
    """What comes out of norms and activations, and weights in lower precision, are computed again, as without
    graphs (lattice/transient.py). Left to itself torch keeps whatever a matrix product of the backward pass
    reads."""
    torch._functorch.config.ban_recompute_materialized_backward = False


@contextmanager
def stance(name: str) -> Iterator[None]:
    """torch.compiler.set_stance, but where a user compiles more than a layer: within that torch refuses to
    change it."""
    try:
        chosen = torch.compiler.set_stance(name)
    except RuntimeError:
        yield
        return
    with chosen:
        yield
