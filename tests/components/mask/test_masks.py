"""The independence of packed documents and of padding, in models."""

import pytest
import torch
from mask_models import RECURRENCES, VOCABULARY, all_recurrences, both_backbones, some_ids, tiny

from lattice.components.mask.causal import Causal

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [4, 5, 5, 5, 5, 5, 6, 6]])


@both_backbones
@all_recurrences
def test_no_document_influences_another(backbone, recurrence):
    model = tiny(backbone, recurrence, "document")
    ids = some_ids(2, 8)
    before = model(ids, documents=DOCUMENTS).logits
    for row, number in [(0, 0), (0, 1), (0, 2), (1, 4), (1, 5), (1, 6)]:
        inside = torch.zeros_like(ids, dtype=torch.bool)
        inside[row] = DOCUMENTS[row] == number
        after = model(torch.where(inside, (ids + 1) % VOCABULARY, ids), documents=DOCUMENTS).logits
        torch.testing.assert_close(after[~inside], before[~inside], atol=1e-12, rtol=0)
        assert ((after - before)[inside].abs().amax(dim=-1) > 1e-3).all()


@both_backbones
@all_recurrences
def test_no_gradient_crosses_documents(backbone, recurrence):
    model = tiny(backbone, recurrence, "document")
    ids = torch.arange(8)[None]  # every token of another row of the table
    model(ids, documents=DOCUMENTS[:1]).logits[0, 3:7].square().sum().backward()
    touched = model.decoder.embedding.weight.grad[:8].abs().sum(dim=1) > 0
    assert touched.tolist() == [False] * 3 + [True] * 4 + [False]


@both_backbones
@all_recurrences
def test_a_packed_document_is_the_document_alone(backbone, recurrence):
    model = tiny(backbone, recurrence, "document")
    ids = some_ids(2, 8)
    packed = model(ids, documents=DOCUMENTS).logits
    for row in range(2):
        for number in DOCUMENTS[row].unique():
            inside = DOCUMENTS[row] == number
            alone = model(ids[row, inside][None]).logits[0]
            torch.testing.assert_close(packed[row, inside], alone, atol=1e-10, rtol=0)


@both_backbones
def test_the_causal_mask_does_let_documents_see_each_other(backbone):
    ids = some_ids(2, 8)
    causal, document = (tiny(backbone, RECURRENCES["one_thought"], kind) for kind in ("causal", "document"))
    across = causal(ids, documents=DOCUMENTS).logits
    torch.testing.assert_close(across, causal(ids).logits)
    apart = document(ids, documents=DOCUMENTS).logits
    torch.testing.assert_close(across[0, :3], apart[0, :3])
    assert ((across - apart)[0, 3:].abs().amax(dim=-1) > 1e-3).all()
    torch.testing.assert_close(document(ids).logits, causal(ids).logits)  # no documents given: one a row


PADDING = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0] * 6])


@both_backbones
@all_recurrences
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_padding_is_not_seen_and_gives_no_nan(backbone, recurrence, mask):
    model = tiny(backbone, recurrence, mask)
    ids, real = some_ids(5, 6), PADDING.bool()
    documents = torch.arange(6).expand(5, -1) // 3 if mask == "document" else None
    logits = model(ids, attention_mask=PADDING, documents=documents).logits
    assert torch.isfinite(logits).all()
    other = torch.where(real, ids, (ids + 7) % VOCABULARY)
    changed = model(other, attention_mask=PADDING, documents=documents).logits
    torch.testing.assert_close(changed[real], logits[real], atol=1e-12, rtol=0)

    targets = torch.where(real, ids, -100)
    model(ids, attention_mask=PADDING, documents=documents, targets=targets).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    model.zero_grad()
    model(other, attention_mask=PADDING, documents=documents, targets=targets).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-12, rtol=1e-9)


@both_backbones
@all_recurrences
def test_padded_rows_are_the_rows_alone(backbone, recurrence):
    model = tiny(backbone, recurrence, "causal")
    ids = some_ids(5, 6)
    logits = model(ids, attention_mask=PADDING).logits
    for row, real in enumerate(PADDING.bool()):
        if real.any():
            alone = model(ids[row, real][None]).logits[0]
            torch.testing.assert_close(logits[row, real], alone, atol=1e-10, rtol=0)


@both_backbones
@all_recurrences
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_does_not_count_padding(backbone, recurrence, window):
    """Which lies between a right-padded prompt and what follows it, or where the mask has gaps."""
    model, ids = tiny(backbone, recurrence), some_ids(3, 6)
    model.mask = Causal(window=window)
    padding = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 1]])
    logits = model(ids, attention_mask=padding).logits
    _, cache = model.prefill(ids, padding)
    following = [model.step(ids[:, at : at + 1], cache) for at in range(2)]
    for row, real in enumerate(padding.bool()):
        alone = ids[row, real][None]
        torch.testing.assert_close(logits[row, real], model(alone).logits[0], atol=1e-10, rtol=0)
        _, cache = model.prefill(alone)
        for at, logits_BV in enumerate(following):
            own_BV = model.step(ids[row : row + 1, at : at + 1], cache)
            torch.testing.assert_close(logits_BV[row], own_BV[0], atol=1e-10, rtol=0)
