"""Products in float32 by oneDNN: other kernels, the same numbers, and the same kept and computed again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import lattice
from lattice import onednn
from lattice.draws import Draw
from lattice.linear import Linear
from lattice.memory import step_memory, traced_step
from lattice.plan import CHECKPOINTING
from lattice.testing.counted import operations

FASTER = onednn.faster.__wrapped__
pytestmark = pytest.mark.skipif(onednn.PRODUCT is None, reason="torch was built without oneDNN")


@pytest.fixture(scope="module", autouse=True)
def everywhere():
    """On any processor, for any size, and heads in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "faster", lambda: True)
        patch.setattr(onednn, "SMALLEST", 0)
        patch.setattr(onednn, "OUTPUTS", 7)
        yield


def laid_out(tensor, layout):
    """The same numbers, elsewhere in memory."""
    match layout:
        case "rows apart":
            return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
        case "transposed":
            return tensor.mT.contiguous().mT
        case "expanded":
            return tensor[:1].expand_as(tensor)
    return tensor


@given(
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    learning=st.tuples(*[st.booleans()] * 3),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "rows apart", "transposed", "expanded"])] * 2),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_and_gradients_are_those_of_torch(leading, inputs, outputs, learning, layouts, biased, seed):
    drawn = torch.Generator().manual_seed(seed)
    shapes = [(*leading, inputs), (outputs, inputs), (outputs,)]
    tensors = [torch.randn(shape, generator=drawn) for shape in shapes]
    grad = laid_out(torch.randn(*leading, outputs, generator=drawn), layouts[1])
    if not biased:
        tensors, learning = tensors[:2], learning[:2]
    found = []
    for linear, dtype in ((onednn.linear, torch.float32), (F.linear, torch.float64)):
        leaves = [
            tensor.detach().to(dtype).requires_grad_(on) for tensor, on in zip(tensors, learning, strict=True)
        ]
        x, weight, *bias = leaves
        out = linear(laid_out(x, layouts[0]), weight, *(bias or [None]))
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        assert out.requires_grad == bool(asked)
        gradients = torch.autograd.grad(out, asked, grad.to(dtype)) if asked else ()
        found.append([out.detach(), *gradients])
    for one, exact in zip(*found, strict=True):
        torch.testing.assert_close(one, exact.float(), atol=1e-4, rtol=1e-5)


def test_what_it_is_not_for_is_left_to_torch(monkeypatch):
    linear, x = Linear(8, 16), torch.randn(3, 8)

    def served(linear, x):
        return calls_of_onednn(lambda: linear(x)) > 0

    assert served(linear, x)
    assert not served(linear.double(), x.double())
    assert not served(linear.bfloat16(), x.bfloat16())
    linear.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not served(linear, x)
    with monkeypatch.context() as off:
        off.setattr(torch.backends.mkldnn, "enabled", False)
        assert not served(linear, x)
    transposed = Linear(16, 16)
    transposed.weight.data = transposed.weight.data.t()
    assert not served(transposed, torch.randn(3, 16))
    monkeypatch.setattr(onednn, "SMALLEST", 3 * 8 * 16)
    assert served(linear, x)
    assert not served(linear, x[:2])
    monkeypatch.setattr(onednn, "faster", lambda: False)
    assert not served(linear, x)


def calls_of_onednn(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "DEFAULT", False),
    ],
)
def test_it_is_taken_where_MKL_leaves_half_of_the_processor_idle(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr("lattice.hardware.vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert FASTER() is expected


def recipe_of(backbone, checkpointing, **tables):
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    return lattice.load_recipe(
        {
            "backbone": {"kind": backbone, "num_attention_heads": 2, **sizes},
            "recurrence": {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"train": [2, 2]}},
            "activation_checkpoint": CHECKPOINTING[checkpointing],
            **tables,
        }
    )


IDS = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
every_setting = pytest.mark.parametrize(
    ("backbone", "checkpointing"),
    [(backbone, kind) for backbone in ("gpt_neox", "llama") for kind in CHECKPOINTING],
)


@every_setting
def test_training_is_the_same(backbone, checkpointing, monkeypatch):
    """The loss, its gradients, and the operations, those that are computed again among them."""
    model = lattice.build_model(recipe_of(backbone, checkpointing))
    found = []

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(IDS, targets=IDS, draw=Draw(0, 0)).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])

    ours = operations(step)
    assert calls_of_onednn(step) > 0
    monkeypatch.setattr(onednn, "faster", lambda: False)
    assert calls_of_onednn(step) == 0
    assert ours == operations(step)
    for one, torchs in zip(found[0], found[-1], strict=True):
        torch.testing.assert_close(one, torchs, atol=1e-6, rtol=1e-4)


@every_setting
def test_memory_is_predicted(backbone, checkpointing):
    recipe = recipe_of(backbone, checkpointing, optimizer={"kind": "adamw"})
    model = lattice.build_model(recipe)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    live = traced_step(model, IDS, recipe.component("precision"))
    predicted = step_memory(recipe, rows=2, length=24)
    assert predicted.total - predicted.optimizer == pytest.approx(max(live.peak, 2 * weights), rel=0.02)
