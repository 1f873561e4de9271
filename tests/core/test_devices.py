"""No tensor is made on another device than the model's. The meta device stands for a GPU: it computes nothing
and refuses most operations between its tensors and the CPU's, and what would have to wait for a value."""

import pytest
import torch

from lattice.build import build_model
from lattice.draws import Draw
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
