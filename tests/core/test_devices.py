"""No tensor is made on another device than the model's. The meta device stands for a GPU: it computes nothing
and refuses most operations between its tensors and the CPU's, and what would have to wait for a value."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lattice import hardware
from lattice.build import build_model, undrawn_model
from lattice.draws import Draw
from lattice.hardware import peak_of
from lattice.recipe import load_recipe
from tests.built_in import built_in

BACKBONES = {
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}
RECURRENCES = [{"kind": kind} for kind in sorted(built_in("recurrence"))] + [
    {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel"},
    {"kind": "latent_thoughts", "thoughts": 2, "feedback": "softmax", "top_k": 5},
    {"kind": "latent_thoughts", "thoughts": 2, "position_ids": "fresh", "grad_passes": 1},
]


@pytest.mark.parametrize(
    "mask", [{"kind": "causal"}, {"kind": "document", "window": 5, "thoughts": "last"}], ids=str
)
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_and_decoding_stay_on_the_device(backbone, recurrence, mask):
    sizes = {"kind": backbone, "vocab_size": 64, **BACKBONES[backbone]}
    model = build_model({"backbone": sizes, "recurrence": recurrence, "mask": mask}, device="meta")
    ids_BL = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    all_real_BL = torch.ones_like(ids_BL)

    loss = model(ids_BL, all_real_BL, documents=ids_BL, targets=ids_BL, draw=Draw(0, 0)).loss
    loss.backward()
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}
    model.hidden_states(ids_BL, all_real_BL, branches=ids_BL)
    for parallel in (True, False):
        _, cache = model.prefill(ids_BL, all_real_BL, parallel=parallel)
        assert model.step(ids_BL[:, :1], cache).device.type == "meta"


def lie_on(device, part):
    """Weights there, and inputs moved there as by accelerate's hooks."""
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(weight, device=device)))
        module.register_forward_pre_hook(
            lambda _, args, kwargs: send_to_device((args, kwargs), device), with_kwargs=True
        )


@pytest.mark.parametrize("on_first", [1, 3])
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
@torch.no_grad()
def test_layers_may_lie_on_several_devices(recurrence, on_first):
    """Tensors without values, that refuse to meet those of another device: `cpu:1` stands for another GPU."""
    sizes = {"kind": "gpt_neox", "vocab_size": 64, **BACKBONES["gpt_neox"]}
    with FakeTensorMode():
        model = undrawn_model(load_recipe({"backbone": sizes, "recurrence": recurrence}))
        decoder = model.decoder
        parts = [decoder.embedding, *decoder.blocks, decoder.final_norm, decoder.head]
        for index, part in enumerate(parts):
            lie_on("cpu" if index < on_first else "cpu:1", part)
        if isinstance(model.unroll, nn.Module):
            lie_on("cpu", model.unroll)
        ids_BL = torch.zeros(2, 2, dtype=torch.int64)
        for mask_BL in (None, torch.ones_like(ids_BL)):
            assert model(ids_BL, mask_BL).logits.device == torch.device("cpu")
            for parallel in (True, False):
                _, cache = model.prefill(ids_BL, mask_BL, parallel=parallel)
                model.step(ids_BL[:, :1], cache)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_peak_is_that_of_the_very_gpu(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda")) == peak


def test_a_processor_is_named_with_its_generation(tmp_path, monkeypatch):
    said = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "PROCESSORS", said)
    assert hardware.vendor() == ""
    assert "family" not in hardware.describe(torch.device("cpu"))  # not Linux
    one = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
    said.write_text(f"{one}\n{one.replace('26', '27')}\n")
    assert hardware.vendor() == "AuthenticAMD"
    assert hardware.describe(torch.device("cpu")).startswith("AMD EPYC (family 26, model 2), ")
