"""Which of torch's attention kernels may be taken: not cuDNN's where lengths vary, as when decoding; and
FlexAttention's own there too, whatever else runs uncompiled."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import lattice
from lattice import attention_mask, decoder
from lattice.draws import Draw
from lattice.hardware import any_length

IDS = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    backbone = {"kind": "gpt_neox", "vocab_size": 40, "max_position_embeddings": 32, **sizes}
    thinking = {"kind": "latent_thoughts", "thoughts": 1, "jacobi": {"train": [1, 1], "eval": 1}}
    return lattice.build_model({"backbone": backbone, "recurrence": thinking})


@pytest.fixture
def seen(monkeypatch):
    """Of each call of attention whether torch may take cuDNN's."""
    found, attention = [], decoder.attention

    def watched(*tensors, **options):
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*tensors, **options)

    monkeypatch.setattr(decoder, "attention", watched)
    return found


def test_training_takes_any(model, seen):
    model(IDS, targets=IDS, draw=Draw(0, 0)).loss.backward()
    assert seen
    assert all(seen)


@pytest.mark.parametrize(
    "without_gradients",
    [
        lambda model: model(IDS),
        lambda model: model.hidden_states(IDS),
        lambda model: lattice.generate(model, IDS, 3),
        lambda model: lattice.generate(model, IDS, 3, parallel_prefill=True),
    ],
    ids=["forward", "hidden_states", "generate", "parallel prefill"],
)
def test_what_has_no_gradients_does_not_take_cudnn(model, seen, without_gradients):
    with torch.no_grad():
        without_gradients(model)
    assert seen
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_it_is_as_it_was_after_an_error(model):
    with torch.no_grad(), pytest.raises(ValueError, match="context of 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("chosen", [[SDPBackend.CUDNN_ATTENTION], [SDPBackend.MATH]])
def test_a_choice_of_the_user_stays(model, seen, monkeypatch, chosen):
    """Where cuDNN's is the only one allowed, and where it is not."""
    monkeypatch.setattr(
        decoder,
        "attention",
        lambda query, *others, **options: (
            seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
            or query
        ),
    )
    with torch.no_grad(), sdpa_kernel(chosen):
        model(IDS)
        now = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    assert set(seen) == {now}
    assert now == (SDPBackend.CUDNN_ATTENTION in chosen, SDPBackend.MATH in chosen)


def test_flex_attention_stays_compiled():
    """Without its kernel it would hold all scores. Here the kernel is a stand-in that tells how it is run."""
    stand_in = torch.compile(lambda one: one + torch.compiler.is_compiling(), backend="eager")
    attention = attention_mask._always(stand_in)
    layer = torch.compile(lambda one: attention(one) + 2 * torch.compiler.is_compiling(), backend="eager")
    with torch.no_grad(), any_length():
        assert attention(torch.zeros(1)) == 1
        assert layer(torch.zeros(1)) == 1
    assert layer(torch.zeros(1)) == 3
    torch.compiler.reset()
