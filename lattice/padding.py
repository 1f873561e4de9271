"""Rows of unequal length as one batch. Shapes: B rows, L tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids, or other numbers of tokens (B, L), padded on the right, and which are real (B, L), 1 and 0;
    None where all are."""
    ids_BL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    real_BL = torch.arange(ids_BL.shape[1]) < lengths_B1
    return ids_BL.to(device), None if bool(real_BL.all()) else real_BL.long().to(device)
