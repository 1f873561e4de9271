"""Further members of the family of solvers, tried against those that ship; see solvers.py for what came out.

Each takes a model of latent thoughts, ids (B, L) and a number of iterations, and returns the hidden states
that predict, (B, L, D). All have the sequential definition as their fixed point.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lattice.cache import KVCache
from lattice.model import LanguageModel
from lattice.slots import Tokens
from lattice.stack import Stack


def stack_of(model: LanguageModel, ids_BL: Tensor, first: int = 0) -> Stack:
    return Stack(model.decoder, model.mask, model.checkpointing, Tokens.of(ids_BL, first=first))


def embedded(model: LanguageModel, stack: Stack, ids_BL: Tensor) -> Tensor:
    return (stack.embed(ids_BL) * math.sqrt(2.5 * model.shape.hidden_size)).unsqueeze(2)


def chunks(model: LanguageModel, ids_BL: Tensor, count: int, thoughts: int, size: int) -> Tensor:
    """Gauss-Seidel over chunks of `size` tokens, each swept count + 1 times before the next begins."""
    cache, predicted = KVCache(model.shape.num_layers), []
    for first in range(0, ids_BL.shape[1], size):
        ids_BC = ids_BL[:, first : first + size]
        stack = stack_of(model, ids_BC, first)
        for _ in range(count + 1):
            slot = embedded(model, stack, ids_BC)
            for stage in range(thoughts + 1):
                slot = stack.run(slot, first_stage=stage, cache=cache)
        predicted.append(slot.squeeze(2))
    return torch.cat(predicted, dim=1)


def anderson(model: LanguageModel, ids_BL: Tensor, count: int, thoughts: int, memory: int) -> Tensor:
    """Jacobi iteration with Anderson mixing (Walker and Ni, SIAM J. Numer. Anal. 49, 2011): the next thoughts
    are the combination of the last `memory` + 1 images whose residuals cancel best, for each row."""
    stack = stack_of(model, ids_BL)
    token_BL1D = embedded(model, stack, ids_BL)
    slots = token_BL1D
    for _ in range(thoughts):
        slots = torch.cat([token_BL1D, stack.run(slots)], dim=2)
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(count):
        image = stack.run(slots)[:, :, :-1]
        history = [*history[-memory:], (image, image - slots[:, :, 1:])]
        slots = torch.cat([token_BL1D, _mixed(history)], dim=2)
    return stack.run(slots)[:, :, -1]


def _mixed(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    image, residual = history[-1]
    if len(history) == 1:
        return image
    rows = len(image)
    steps_BNm = torch.stack([(residual - r).reshape(rows, -1) for _, r in history[:-1]], dim=2)
    gram_Bmm = steps_BNm.mT @ steps_BNm
    gram_Bmm = gram_Bmm + 1e-10 * gram_Bmm.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] * torch.eye(
        gram_Bmm.shape[-1], dtype=gram_Bmm.dtype
    )
    weights_Bm1 = torch.linalg.solve(gram_Bmm, steps_BNm.mT @ residual.reshape(rows, -1, 1))
    mixed = image
    for (earlier, _), weight_B in zip(history[:-1], weights_Bm1.squeeze(-1).T, strict=True):
        mixed = mixed - weight_B[:, None, None, None] * (image - earlier)
    return mixed
