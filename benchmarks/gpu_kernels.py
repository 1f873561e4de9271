"""What bounds a step: a GPU's matrix products and attention by themselves. See benchmarks/gpu.py."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from gpu_cases import Cases, recipe_of, synchronize
from gpu_speed import repeated
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CALLS = 20
"""Of a kernel between two looks at the clock."""
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ROWS = 2
"""Sequences of one thought."""


def kernels(options: argparse.Namespace, size: str) -> Cases:
    """Of a layer of this size, for as many slots as two sequences with one thought have."""
    backbone = recipe_of(size, 1, device=options.device).table()["backbone"]
    given = {"options": options, "slots": 2 * options.length}
    for inputs, outputs in products(backbone):
        for format in ("bf16", "float8_tensorwise", "float8_rowwise"):
            labels = {"size": size, "kernel": "product", "format": format, "in": inputs, "out": outputs}
            yield labels, functools.partial(_product, labels=labels, **given)
    for backend in BACKENDS:
        labels = {"size": size, "kernel": "attention", "backend": backend}
        yield labels, functools.partial(_attention, backend=backend, backbone=backbone, **given)


def products(backbone: dict[str, Any]) -> list[tuple[int, int]]:
    """Inputs and outputs of the linears of a GPT-NeoX layer, and a large product beside them."""
    hidden, wide = backbone["hidden_size"], backbone["intermediate_size"]
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden), (wide, wide)]


def _product(found: dict[str, Any], *, labels: dict[str, Any], slots: int, options: Any) -> None:
    inputs, outputs, device = labels["in"], labels["out"], options.device
    left = torch.randn(ROWS * slots, inputs, device=device, dtype=torch.bfloat16)
    right = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    call = functools.partial(torch.mm, left, right.t())
    if labels["format"] != "bf16":
        each = labels["format"].endswith("rowwise")
        (left_8, left_scale), (right_8, right_scale) = scaled(left, each), scaled(right, each)
        call = functools.partial(
            torch._scaled_mm,
            left_8,
            right_8.t(),
            left_scale,
            right_scale.t() if each else right_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    found["tflops"] = rate(call, 2 * ROWS * slots * inputs * outputs, options)


def scaled(values: Tensor, each_row: bool) -> tuple[Tensor, Tensor]:
    """In float8, with one scale for all or one for each row."""
    largest = values.abs().amax(dim=1, keepdim=True) if each_row else values.abs().amax()
    scale = largest.float() / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn), scale


def _attention(
    found: dict[str, Any], *, backend: str, backbone: dict[str, Any], slots: int, options: Any
) -> None:
    """Counted as the ledger does: all pairs, and twice as much for the backward pass."""
    hidden, heads = backbone["hidden_size"], backbone["num_attention_heads"]
    size, device = (ROWS, slots, heads, hidden // heads), options.device
    given = [torch.randn(size, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    inputs = [one.requires_grad_() for one in given]
    query, key, value = inputs
    forward = functools.partial(scaled_dot_product_attention, query, key, value, is_causal=True)
    pairs, chosen = 4 * ROWS * slots**2 * hidden, BACKENDS[backend]
    with nullcontext() if chosen is None else sdpa_kernel(chosen):
        out = forward()
        found["forward_tflops"] = rate(forward, pairs, options)
        backward = functools.partial(
            torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True
        )
        found["backward_tflops"] = rate(backward, 2 * pairs, options)


def rate(call: Callable[[], Any], operations: int, options: argparse.Namespace) -> float:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    calls()
    synchronize(options.device)
    return float(f"{CALLS * operations / statistics.median(repeated(calls, options)) / 1e12:.4g}")
