"""What the tests of masks share: masks of any options, and tiny models of both backbones."""

import pytest
import torch
from hypothesis import strategies as st

import lattice
from lattice.components.mask.causal import Causal
from lattice.components.mask.document import Document

VOCABULARY = 23
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
RECURRENCES = {
    "none": {"kind": "none"},
    "one_thought": {"kind": "latent_thoughts", "thoughts": 1, "jacobi": {"eval": 2}},
    "two_thoughts": {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"eval": 3}},
}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))
all_recurrences = pytest.mark.parametrize("recurrence", list(RECURRENCES.values()), ids=list(RECURRENCES))


def tiny(backbone, recurrence, mask="causal"):
    """In float64, with random weights; `recurrence` is a recipe's table."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    options = {**BACKBONES[backbone], **sizes, "max_position_embeddings": 32}
    tables = {"backbone": options, "recurrence": recurrence, "mask": {"kind": mask}}
    model = lattice.build_model(tables).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


MASKS = {"causal": Causal, "document": Document}


@st.composite
def masks(draw):
    options = {
        "window": draw(st.none() | st.integers(1, 7)),
        "thoughts": draw(st.sampled_from(["all", "own", "last"])),
    }
    return MASKS[draw(st.sampled_from(list(MASKS)))](**options)
