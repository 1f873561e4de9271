from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lattice.components.optimizer.adamw import AdamW


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.linear(self.embedding(ids))))
        return logits


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


def test_matrices_and_embeddings_decay_norms_and_biases_do_not() -> None:
    model = Tiny()
    decaying, others = AdamW(weight_decay=0.3).build(model).param_groups
    assert names(model, decaying) == {"embedding.weight", "linear.weight"}
    assert names(model, others) == {"linear.bias", "norm.weight", "norm.bias"}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert len(decaying["params"]) == 2  # the tied head occurs once


def test_options_reach_the_optimizer() -> None:
    group = AdamW(lr=0.02, betas=(0.8, 0.9), eps=1e-6).build(Tiny()).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 1e-6)
    assert group["fused"]


def test_not_fused_where_there_is_no_kernel() -> None:
    group = AdamW().build(Tiny().to("meta")).param_groups[0]
    assert group["foreach"]
    assert not group["fused"]


def trained(threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(301, 257), nn.LayerNorm(257))
        optimizer = AdamW(lr=0.01).build(model)
        source = torch.Generator().manual_seed(1)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=source)
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]
    finally:
        torch.set_num_threads(before)


def test_fused_on_cpu_gives_the_same_bits_whatever_the_threads() -> None:
    first = trained(threads=1)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, trained(threads), strict=True))


def test_one_step_is_adamw_s() -> None:
    model = nn.Linear(3, 2)
    weight, bias = (parameter.detach().double() for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    AdamW(lr=0.01, weight_decay=0.1).build(model).step()
    # The first step moves every parameter by lr · sign(gradient); what decays shrinks by lr · weight_decay.
    torch.testing.assert_close(model.weight.detach().double(), weight * (1 - 0.001) - 0.01, rtol=0, atol=1e-7)
    torch.testing.assert_close(model.bias.detach().double(), bias - 0.01, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("eps", -1e-8),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("weight_decay", -0.1),
        ("grad_clip", -0.1),
    ],
)
def test_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option} = "):
        AdamW(**{option: value})
