"""What components declare of their cost, against operations counted as the model runs."""

import pytest
import torch

import lattice
from lattice.draws import Draw
from lattice.ledger import ledger
from lattice.plan import CHECKPOINTING
from lattice.testing.counted import operations

LENGTH = 48
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 4},
    "gpt_neox_sequential": {"kind": "gpt_neox", "num_attention_heads": 4, "use_parallel_residual": False},
    "llama": {"kind": "llama", "num_attention_heads": 4},
    "llama_grouped": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
THINKING = {"kind": "latent_thoughts", "jacobi": {"train": [2, 2], "eval": 3}}
SWEEPING = {
    **THINKING,
    "solver": "gauss_seidel",
    "gauss_seidel": {"train": [2, 2], "eval": 1},
}
RECURRENCES = {
    "none": {"kind": "none"},
    "pause": {"kind": "pause", "pauses": 2},
    "loop": {"kind": "loop", "loops": 2},
    "ponder": {"kind": "ponder", "steps": 2},
    "hidden_ponder": {"kind": "hidden_ponder", "steps": 2},
    "depth": {"kind": "depth", "repetitions": {"train": [3, 3], "eval": 2}, "grad_passes": 2},
    "depth_concat": {"kind": "depth", "inject": "concat", "prelude": 0, "repetitions": {"train": [4, 4]}},
    "thoughts_1": {**THINKING, "thoughts": 1},
    "thoughts_3": {**THINKING, "thoughts": 3},
    "thoughts_cut": {**THINKING, "thoughts": 2, "grad_passes": 2},
    "softmax": {**THINKING, "thoughts": 2, "feedback": "softmax"},
    "softmax_top_k": {**THINKING, "thoughts": 2, "feedback": "softmax", "top_k": 3},
    "sweeps_1": {**SWEEPING, "thoughts": 1},
    "sweeps_3": {**SWEEPING, "thoughts": 3},
    "sweeps_cut": {**SWEEPING, "thoughts": 2, "grad_passes": 1},
}
all_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))
all_recurrences = pytest.mark.parametrize("recurrence", list(RECURRENCES))


def recipe_of(backbone, recurrence, layers=6, **tables):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers, "vocab_size": 40}
    return lattice.load_recipe(
        {
            "backbone": {**BACKBONES[backbone], **sizes, "max_position_embeddings": 64},
            "recurrence": RECURRENCES[recurrence],
            **tables,
        }
    )


def some_ids(rows, length):
    return torch.randint(39, (rows, length), generator=torch.Generator().manual_seed(0))


@all_backbones
@all_recurrences
@pytest.mark.parametrize("layers", [3, 6])
def test_operations_of_training(backbone, recurrence, layers):
    recipe = recipe_of(backbone, recurrence, layers)
    model, ids = lattice.build_model(recipe), some_ids(2, LENGTH)

    def step():
        model(ids, targets=ids, draw=Draw(0, 0)).loss.backward()

    counted = operations(step) / ids.numel()
    # The gradient of what enters the first layer may not be needed: of a pause row, but never of a thought.
    assert ledger(recipe, length=LENGTH).training_operations == pytest.approx(counted, rel=0.01)


@all_backbones
@pytest.mark.parametrize("recurrence", ["pause", "thoughts_1", "softmax", "sweeps_cut"])
@pytest.mark.parametrize("checkpointing", [name for name in CHECKPOINTING if name != "none"])
def test_operations_computed_again(backbone, recurrence, checkpointing):
    """The last product of a pass is not computed again where nothing in it needs the result: under 1 %."""
    recipe = recipe_of(backbone, recurrence, activation_checkpoint=CHECKPOINTING[checkpointing])
    model, ids = lattice.build_model(recipe), some_ids(2, LENGTH)
    costs = ledger(recipe, length=LENGTH)
    counted = operations(lambda: model(ids, targets=ids, draw=Draw(0, 0)).loss.backward()) / ids.numel()
    assert costs.training_operations + costs.repeated_operations == pytest.approx(counted, rel=0.01)


@all_backbones
@all_recurrences
def test_operations_of_evaluation_and_decoding(backbone, recurrence):
    recipe = recipe_of(backbone, recurrence)
    model, ids = lattice.build_model(recipe).eval(), some_ids(2, LENGTH)
    costs = ledger(recipe, length=LENGTH)
    with torch.no_grad():
        assert costs.evaluation_operations == pytest.approx(
            operations(lambda: model(ids)) / ids.numel(), rel=0.01
        )
        _, cache = model.prefill(ids[:, :-1], parallel=True)
        counted = operations(lambda: model.step(ids[:, -1:], cache)) / len(ids)
        assert costs.inference_operations == pytest.approx(counted, rel=0.01)


@all_backbones
@all_recurrences
def test_numbers_in_the_cache(backbone, recurrence):
    recipe = recipe_of(backbone, recurrence)
    model, ids = lattice.build_model(recipe).eval(), some_ids(1, 5)
    _, cache = model.prefill(ids)
    assert ledger(recipe).cached_numbers == cache.numbers / 5
