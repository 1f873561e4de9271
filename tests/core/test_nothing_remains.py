"""What a forward builds goes when it is over, without waiting for Python to look for cycles: masks, tables of
positions and ids would lie on the GPU beside those of later steps until then."""

import gc
import weakref

import pytest
import torch

import lattice
from lattice.draws import Draw
from lattice.stack import Stack
from tests.built_in import built_in

RECURRENCES = [{"kind": kind} for kind in sorted(built_in("recurrence"))] + [
    {"kind": "latent_thoughts", "solver": "gauss_seidel"}
]
BACKBONE = {"kind": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES = {"intermediate_size": 48, "vocab_size": 40, "max_position_embeddings": 64}


@pytest.fixture
def stacks(monkeypatch):
    """Those that are alive, counted while no cycle is looked for."""
    made, init = [], Stack.__init__

    def counted(self, *arguments, **options):
        init(self, *arguments, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Stack, "__init__", counted)
    gc.disable()
    yield lambda: (len(made), sum(stack() is not None for stack in made))
    gc.enable()


@pytest.mark.parametrize("checkpointing", ["none", "block", "pass"])
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda table: "-".join(table.values()))
def test_of_a_step_nor_of_an_evaluation_nor_of_generated_text(recurrence, checkpointing, stacks):
    tables = {"recurrence": recurrence, "activation_checkpoint": {"kind": checkpointing}}
    model = lattice.build_model({"backbone": BACKBONE | SIZES, **tables})
    ids = torch.randint(39, (2, 8), generator=torch.Generator().manual_seed(0))
    model(ids, targets=ids, draw=Draw(0, 0)).loss.backward()
    with torch.no_grad():
        model(ids)
    lattice.generate(model, ids, 2)
    made, alive = stacks()
    assert made > 3
    assert alive == 0
