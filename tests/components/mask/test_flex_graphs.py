"""FlexAttention compiled as on a GPU, but for the code it generates: rows and lengths change all the time."""

import operator

import pytest
import torch
from mask_models import both_backbones, some_ids
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._pytree import tree_leaves

import lattice
from lattice import attention_mask
from lattice.components.mask.causal import Causal
from lattice.graphs import GRAPHS
from lattice.slots import Slots, Tokens


def without_constants(graph, inputs):
    """torch's "eager" backend, for masks that index by tensors alone: of an integer torch makes a constant,
    copied to the device."""
    indices = [
        index
        for mask in graph.children()
        for node in mask.graph.nodes
        if node.target is operator.getitem
        for index in tree_leaves(node.args[1])
    ]
    assert indices
    assert not any(isinstance(index, int) for index in indices)
    return graph.forward


SHAPES = [(2, 24), (1, 24), (2, 40), (3, 17), (1, 31), (2, 12), (4, 28), (1, 8), (3, 36), (2, 21)]
SWEEPS = {"kind": "latent_thoughts", "thoughts": 2, "solver": "gauss_seidel"}
MASK = {"kind": "document", "window": 9, "thoughts": "last"}


@pytest.mark.parametrize("layers", ["as they are", "compiled"])
@both_backbones
def test_it_stays_compiled_whatever_the_shapes(backbone, layers, monkeypatch):
    """Past torch's limit it would go on uncompiled, and hold all scores: an error here. Compiled layers run
    as they are where no gradients are asked for."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 23}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 64}
    recipe = lattice.load_recipe(
        {
            "backbone": {"kind": backbone, **sizes},
            "recurrence": SWEEPS,
            "mask": MASK,
            "compile": {"kind": "block", "backend": "eager"},
        }
    )
    model = lattice.build_model(recipe).eval()
    model.requires_grad_(False)  # on a CPU FlexAttention has no gradients
    shapes = SHAPES if layers == "as they are" else SHAPES[:3]
    batches = [
        {"input_ids": some_ids(*shape), "documents": (torch.arange(shape[1]) // 7).expand(shape)}
        for shape in shapes
    ]
    with torch.no_grad():
        by_booleans = [model(**batch).logits for batch in batches]

    torch.compiler.reset()
    counters.clear()
    if layers == "compiled":
        recipe.component("compile").apply(model)
    compiled = torch.compile(flex_attention, backend=without_constants)
    monkeypatch.setattr(attention_mask, "_flex_attention", lambda device: attention_mask._always(compiled))
    monkeypatch.setattr(attention_mask, "_takes_blocks", lambda queries: True)
    limit = torch._dynamo.config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True)
    with torch.set_grad_enabled(layers == "compiled"), limit:
        by_blocks = [model(**batch).logits for batch in batches]
        graphs = counters["stats"]["unique_graphs"]
        for batch in batches:
            model(batch["input_ids"], documents=batch["documents"] // 2)
    torch.testing.assert_close(by_blocks, by_booleans, atol=1e-5, rtol=1e-5)
    assert 0 < graphs < GRAPHS / 2
    assert counters["stats"]["unique_graphs"] == graphs  # none for other documents of known shapes


def test_a_block_mask_brings_its_limit():
    slots = Slots.interleaved(Tokens.of(some_ids(1, 4)), stages=2)
    with torch._dynamo.config.patch(recompile_limit=8):
        attention_mask.block_mask(Causal(), slots, slots)
        assert torch._dynamo.config.recompile_limit == GRAPHS
