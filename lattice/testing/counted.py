"""What a model does, counted as it runs: independent of what its components declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lattice import onednn


def slots_of(inputs: tuple[Any, ...]) -> int:
    """Slots of each row that one call of a layer was for, from the call's positional arguments: what a
    forward pre-hook is given."""
    x_BLnD, given = inputs[0], inputs[5] if len(inputs) > 5 else None
    stages = x_BLnD.shape[2] + (0 if given is None else given.local.shape[2])
    return int(x_BLnD.shape[1] * stages)


def operations(call: Callable[[], Any]) -> int:
    """Operations of the matrix products of `call`, in the convention of lattice.cost."""
    with _Counter() as counter:  # type: ignore[no-untyped-call]
        call()
    return int(counter.total)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, size = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (size + value.shape[3])


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    return 2 * _attention(query, key, value)  # the scores, computed again, are not counted


def _linear(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * len(weight)


_ATEN = torch.ops.aten
# torch counts attention on GPUs alone, and there its recomputation in the backward pass too; of oneDNN's
# operations nothing.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    onednn.PRODUCT: _linear,
}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's FlopCounterMode also follows the modules, and fails where some run without gradients."""

    total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := _FORMULAS.get(func._overloadpacket)) is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out
