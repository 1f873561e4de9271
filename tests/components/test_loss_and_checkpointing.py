"""Chunked cross entropy, activation checkpointing and number formats: the same, computed otherwise."""

import weakref

import pytest
import torch
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

import lattice
from lattice import onednn
from lattice.components.activation_checkpoint.recompute import _policy
from lattice.components.loss.cross_entropy import CrossEntropy
from lattice.components.precision.formats import BFloat16, Float32
from lattice.draws import Draw

VOCABULARY = 31
BACKBONES = {
    "gpt_neox": {"kind": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5},
    "llama": {"kind": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
}
RECURRENCES = {
    "none": {"kind": "none"},
    "latent_thoughts": {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"train": [1, 3], "eval": 2}},
}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES))
CHECKPOINTING = {
    "block": {"kind": "block"},
    "selective": {"kind": "selective"},
    "pass": {"kind": "pass"},
    "pass_blocks": {"kind": "pass", "blocks": True},
}
both_recurrences = pytest.mark.parametrize("recurrence", list(RECURRENCES))


def tiny(backbone, recurrence, **tables):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    options = {**BACKBONES[backbone], **sizes, "max_position_embeddings": 32}
    return lattice.build_model({"backbone": options, "recurrence": RECURRENCES[recurrence], **tables})


def some_ids(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_problem(count, ignored):
    generator = torch.Generator().manual_seed(count)
    head = nn.Linear(8, VOCABULARY)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(count, 8, generator=generator, requires_grad=True)
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    if ignored == "some":
        targets[torch.rand(count, generator=generator) < 0.4] = -100
    elif ignored == "all":
        targets[:] = -100
    elif ignored == "first":
        targets[: count // 2] = -100
    return head, hidden, targets


def with_gradients(loss, head, hidden):
    return loss, torch.autograd.grad(loss, [hidden, head.weight, head.bias])


@pytest.mark.parametrize("ignored", ["nothing", "some", "first", "all"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 7, 11, 12, 13, 4096])
def test_cross_entropy_in_chunks(chunk, ignored):
    head, hidden, targets = loss_problem(12, ignored)
    total, count = CrossEntropy(chunk_tokens=chunk).total(hidden, head, targets)
    loss, gradients = with_gradients(total, head, hidden)
    reference = F.cross_entropy(head(hidden), targets, reduction="sum")
    expected, expected_gradients = with_gradients(reference, head, hidden)
    assert count.item() == (targets != -100).sum().item()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, value, atol=1e-5, rtol=1e-5)
    if ignored == "all":
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("ignored", ["nothing", "some", "first", "all"])
@pytest.mark.parametrize("chunk", [1, 5, 12, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_targets(chunk, ignored, dtype):
    head, hidden, targets = loss_problem(12, ignored)
    weights = torch.linspace(-1, 2, 12).to(dtype).requires_grad_()
    tensors = [hidden, weights, head.weight, head.bias]
    total, count = CrossEntropy(chunk_tokens=chunk).total(hidden, head, targets, weights)
    reference = (weights.float() * F.cross_entropy(head(hidden), targets, reduction="none")).sum()
    assert count.item() == (targets != -100).sum().item()
    torch.testing.assert_close(total, reference, atol=1e-5, rtol=1e-6)
    expected = torch.autograd.grad(reference, tensors)
    torch.testing.assert_close(torch.autograd.grad(total, tensors), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        again, _ = CrossEntropy(chunk_tokens=chunk).total(hidden, head, targets, weights)
    torch.testing.assert_close(again, reference, atol=1e-5, rtol=1e-6)
    for tensor in (hidden, head.weight, head.bias):
        tensor.requires_grad_(False)
    total, _ = CrossEntropy(chunk_tokens=chunk).total(hidden, head, targets, weights)
    torch.testing.assert_close(torch.autograd.grad(total, weights)[0], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [5, 12, 13])
def test_cross_entropy_under_autocast(chunk):
    """Logits come in bfloat16, the loss is still computed in float32."""
    head, hidden, targets = loss_problem(12, "some")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = CrossEntropy(chunk_tokens=chunk).total(hidden, head, targets)
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    loss, gradients = with_gradients(total, head, hidden)
    assert loss.dtype == torch.float32
    rounded = F.cross_entropy(logits.float(), targets, reduction="sum")
    torch.testing.assert_close(loss, rounded, atol=1e-4, rtol=1e-6)
    exact, exact_gradients = with_gradients(
        F.cross_entropy(head(hidden), targets, reduction="sum"), head, hidden
    )
    torch.testing.assert_close(loss, exact, atol=0, rtol=2e-2)
    for gradient, value in zip(gradients, exact_gradients, strict=True):
        assert (gradient - value).norm() < 3e-2 * value.norm()


def test_logits_are_held_for_a_chunk_and_computed_once():
    head, hidden, targets = loss_problem(12, "nothing")
    sizes, alive = [], []

    def watch(module, inputs, output):
        assert not any(earlier() is not None for earlier in alive)
        alive.append(weakref.ref(output))
        sizes.append(len(output))

    head.register_forward_hook(watch)
    total, _ = CrossEntropy(chunk_tokens=5).total(hidden, head, targets)
    assert not any(earlier() is not None for earlier in alive)
    total.backward()
    assert sizes == [5, 5, 2]


def test_a_gradient_is_given_once():
    head, hidden, targets = loss_problem(12, "nothing")
    total, _ = CrossEntropy(chunk_tokens=5).total(hidden, head, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        total.backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_only_what_is_asked_for_has_a_gradient(frozen):
    head, hidden, targets = loss_problem(12, "some")
    for name, tensor in (("hidden", hidden), ("weight", head.weight), ("bias", head.bias)):
        tensor.requires_grad_(frozen not in (name, "all"))
    total, _ = CrossEntropy(chunk_tokens=5).total(hidden, head, targets)
    reference = F.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(total, reference)
    asked = [tensor for tensor in (hidden, head.weight, head.bias) if tensor.requires_grad]
    assert total.requires_grad == bool(asked)
    if asked:
        pairs = zip(torch.autograd.grad(total, asked), torch.autograd.grad(reference, asked), strict=True)
        for gradient, expected in pairs:
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@both_backbones
@both_recurrences
def test_a_model_gives_the_loss_of_its_logits(backbone, recurrence):
    model = tiny(backbone, recurrence, loss={"kind": "cross_entropy", "chunk_tokens": 5})
    ids, targets = some_ids(2, 7), some_ids(2, 7, seed=1)
    targets[0, 3:] = -100
    output = model(ids, targets=targets)
    assert output.logits is None
    assert output.count.item() == 10
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.loss_sum, 10 * expected)


def test_chunks_of_no_tokens():
    with pytest.raises(lattice.RecipeError, match=r"loss\.chunk_tokens = 0: must be at least 1"):
        lattice.load_recipe({"loss": {"kind": "cross_entropy", "chunk_tokens": 0}})


def loss_and_gradients(model, draw=None, autocast=False, mask=None):
    ids, targets = some_ids(2, 6), some_ids(2, 6, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(ids, attention_mask=mask, targets=targets, draw=draw)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@both_backbones
@both_recurrences
@pytest.mark.parametrize("kind", list(CHECKPOINTING))
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_recomputation_changes_no_gradient(backbone, recurrence, kind, autocast, padded):
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]) if padded else None
    for draw in (None, Draw(0, 1)):
        expected, gradients = loss_and_gradients(tiny(backbone, recurrence), draw, autocast, mask)
        model = tiny(backbone, recurrence, activation_checkpoint=CHECKPOINTING[kind])
        output, recomputed = loss_and_gradients(model, draw, autocast, mask)
        assert torch.equal(output.loss, expected.loss)
        assert output.telemetry.keys() == expected.telemetry.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            if kind == "selective" and autocast:  # adds the passes' gradients in float32, not in bfloat16
                assert (recomputed[name] - gradient).norm() < 1e-2 * gradient.norm()
            else:
                torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-5)


@both_backbones
def test_what_is_kept_and_what_is_computed_again(backbone):
    kept, calls = {}, {}
    for kind, table in {"none": {"kind": "none"}, **CHECKPOINTING}.items():
        model = tiny(backbone, "latent_thoughts", activation_checkpoint=table)
        counted, sizes = [], []
        model.decoder.blocks[1].register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))

        def pack(tensor, sizes=sizes):
            sizes.append((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(some_ids(2, 6), targets=some_ids(2, 6, seed=1)).loss
        kept[kind] = sum(size for _, size in set(sizes))
        forward = len(counted)
        loss.backward()
        calls[kind] = (forward, len(counted) - forward)
    passes = 2 + 2 + 1  # warm start, refinements, final pass
    again = {"none": 0, "block": 1, "selective": 1, "pass": 1, "pass_blocks": 2}
    assert calls == {kind: (passes, times * passes) for kind, times in again.items()}
    assert kept["none"] > 1.5 * kept["block"] > 1.5 * kept["pass"] == 1.5 * kept["pass_blocks"]


@both_backbones
@pytest.mark.parametrize("kind", ["block", "pass", "selective"])
def test_recomputation_leaves_evaluation_alone(backbone, kind):
    """Without gradients, and where a cache is filled, nothing is computed twice."""
    model = tiny(backbone, "latent_thoughts", activation_checkpoint={"kind": kind})
    plain, ids = tiny(backbone, "latent_thoughts"), some_ids(2, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    for parallel in (False, True):
        logits, cache = model.prefill(ids, parallel=parallel)
        expected, _ = plain.prefill(ids, parallel=parallel)
        assert torch.equal(logits, expected)
        assert cache.tokens == 5


@both_backbones
@both_recurrences
def test_bf16_is_close_and_keeps_float32_weights(backbone, recurrence):
    model, ids = tiny(backbone, recurrence), some_ids(2, 6)
    device = torch.device("cpu")
    with Float32().autocast(device):
        exact = model(ids).logits
    assert exact.dtype == torch.float32
    BFloat16().apply(model)
    with BFloat16().autocast(device):
        rounded = model(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - exact).norm() < 5e-2 * exact.norm()
    _, gradients = loss_and_gradients(model, autocast=True)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    _, exact_gradients = loss_and_gradients(tiny(backbone, recurrence))
    for name, gradient in gradients.items():
        assert (gradient - exact_gradients[name]).norm() < 0.1 * exact_gradients[name].norm(), name


@both_backbones
def test_decoding_under_autocast(backbone):
    model, ids = tiny(backbone, "latent_thoughts"), some_ids(2, 6)
    exact, _ = model.prefill(ids)
    with BFloat16().autocast(torch.device("cpu")):
        rounded, _ = model.prefill(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 5e-2 * exact.norm()


def test_what_selective_checkpointing_keeps():
    """Products that are not wider than what goes in, by whichever kernel; of FlexAttention, which is no
    operation with overloads, nothing."""
    aten, x_ND = torch.ops.aten, torch.ones(3, 8)
    for outputs in (4, 8, 16):
        weight_DO, bias_O = torch.ones(8, outputs), torch.ones(outputs)
        kept = CheckpointPolicy.MUST_SAVE if outputs <= 8 else CheckpointPolicy.PREFER_RECOMPUTE
        assert _policy(None, aten.mm.default, x_ND, weight_DO) == kept
        assert _policy(None, aten.addmm.default, bias_O, x_ND, weight_DO) == kept
        assert _policy(None, onednn.PRODUCT.default, x_ND, weight_DO.t(), bias_O, "none", [], "") == kept
    for operation in (aten.gelu.default, flex_attention):
        assert _policy(None, operation, x_ND) == CheckpointPolicy.PREFER_RECOMPUTE
