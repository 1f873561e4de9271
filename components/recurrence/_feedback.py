"""What a hidden state becomes as an input: itself, or the mixture of embeddings that it predicts.

Shapes: D hidden, V vocabulary, k candidates, N slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lattice.protocols import Shape
from lattice.stack import Stack

Feedback = Callable[[Stack, Tensor], Tensor]
FeedbackName = Literal["hidden", "softmax"]


def check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1")


def hidden(stack: Stack, hidden_D: Tensor) -> Tensor:
    """The hidden state itself (PonderLM-2, arXiv 2509.23184)."""
    return hidden_D


def mixture_operations(shape: Shape, top_k: int | None) -> int:
    """Of one mixture: the head, and the table if all rows are mixed; a sum of few is no matrix product."""
    products = 2 if top_k is None or top_k >= shape.vocab_size else 1
    return products * 2 * shape.hidden_size * shape.vocab_size


def softmax_mixture(scale: float, top_k: int | None) -> Feedback:
    """softmax(W h) times the scaled embedding table (PonderLM, arXiv 2505.20674), over the `top_k` largest
    logits alone if given. (…, D) -> (…, D)."""

    def mixture(stack: Stack, hidden_D: Tensor) -> Tensor:
        logits, table_VD = stack.logits(hidden_D), stack.table_VD
        if top_k is None or top_k >= logits.shape[-1]:
            mixed = logits.softmax(dim=-1) @ table_VD
        else:
            top, ids = logits.topk(top_k, dim=-1)
            weights_Nk = top.softmax(dim=-1).flatten(0, -2).to(table_VD.dtype)
            # A weighted bag of rows: the rows of all slots are never held at once.
            bags_ND = F.embedding_bag(ids.flatten(0, -2), table_VD, per_sample_weights=weights_Nk, mode="sum")
            mixed = bags_ND.view(hidden_D.shape)
        return mixed.to(hidden_D.dtype) * scale  # an input keeps its precision under autocast

    return mixture
