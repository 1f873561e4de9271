"""Values that are not kept: the same gradients, within all that has a say in what is kept."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lattice
from lattice.build import undrawn_model
from lattice.live_tensors import LiveTensors
from lattice.transient import transient


class Toy(nn.Module):
    """A norm into two linears, and within what it goes into an activation of both into a third one."""

    def __init__(self, through):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.through = nn.LayerNorm(8), through
        self.first, self.second, self.third = (nn.Linear(*size) for size in ((8, 16), (8, 16), (16, 8)))
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return x + self.through(self.norm, x, into=self.mlp)

    def mlp(self, z):
        return self.through(lambda a, b: F.silu(a) * b, self.first(z), self.second(z), into=self.third)


def kept(function, *inputs, into):
    return into(function(*inputs))


def doubled(model, x):
    """Within hooks of somebody else, through which all that is kept goes."""
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (one * 2,), lambda packed: packed[0] / 2):
        return model(x)


CALLS = {
    "plain": lambda model, x: model(x),
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "hooks": doubled,
}


def gradients(model, call, autocast, frozen):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_("x" not in frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = call(model, call(model, x))  # the same weights twice, as in passes
    out.square().sum().backward()
    return out, {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "frozen", [("nothing",), ("norm",), ("first", "x"), ("x", "norm", "first", "second")]
)
@pytest.mark.parametrize("call", list(CALLS))
def test_gradients(call, frozen, autocast):
    out, found = gradients(Toy(transient), CALLS[call], autocast, frozen)
    expected, reference = gradients(Toy(kept), CALLS["plain"], autocast, frozen)
    assert torch.equal(out, expected)
    assert any(value is not None for value in reference.values())
    for name, value in reference.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:  # under autocast what two linears give back is added up in bfloat16
            assert (found[name] - value).norm() <= (1e-2 if autocast else 1e-6) * value.norm(), name


@pytest.mark.parametrize(
    ("backbone", "numbers"),
    [
        # The layer's input; queries, keys, values and what attention makes of them; the activation's input.
        ({"kind": "gpt_neox", "num_attention_heads": 4}, 1 + 4 + 4),
        # The same with half as many keys and values; the input of the MLP, the gate and what it is for.
        ({"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}, 1 + 3 + 1 + 8),
    ],
)
def test_what_a_layer_keeps(backbone, numbers):
    """In multiples of the hidden size, for each slot."""

    def held(layers):
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers, "vocab_size": 64}
        recipe = lattice.load_recipe({"backbone": {**backbone, **sizes}, "recurrence": {"kind": "none"}})
        with FakeTensorMode():
            model, ids = undrawn_model(recipe), torch.zeros(4, 32, dtype=torch.int64)
            live = LiveTensors([*model.parameters(), ids])
            with live:
                logits = model(ids).logits  # keeps the graph
                assert logits.requires_grad
                return live.live - sum(parameter.nbytes for parameter in model.parameters())

    slot = 4 * 64
    log_sum_exp = 4 / 64
    assert (held(4) - held(3)) / (4 * 32 * slot) == pytest.approx(numbers + log_sum_exp, abs=0.01)
