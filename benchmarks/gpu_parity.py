"""Whether a GPU computes what a CPU does, and its fast ways what the plain ones do. See benchmarks/gpu.py."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_cases import ROOT, Cases, build, compile_layers, recipe_of, some_ids
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lattice
from lattice import attention_mask, replay
from lattice.components.mask.document import Document
from lattice.decoder import AttentionMask, Rotary, attend
from lattice.protocols import Precision
from lattice.slots import Slots, Tokens

warnings.filterwarnings("ignore", ".*multiplies the embeddings by")  # drawn weights had no scale before


def parity(options: argparse.Namespace) -> Cases:
    torch.set_float32_matmul_precision("highest")  # no TF32
    yield from golden(options)
    yield from recordings(options)
    yield from formats(options)
    yield from attention(options)  # last: each mask is compiled anew


GOLDEN = ROOT / "tests" / "parity" / "test_golden.py"


def golden(options: argparse.Namespace) -> Cases:
    try:
        names = golden_reader().CASES
    except ImportError as error:  # of pytest: one case fails by it, and all others need none
        yield {"case": "golden"}, functools.partial(_unread, error)
        return
    for name in names[:: 8 if options.tiny else 1]:
        yield {"case": "golden", "name": name}, functools.partial(_golden, name=name, device=options.device)


def _unread(error: ImportError, found: dict[str, Any]) -> None:
    raise error


def golden_reader() -> Any:
    """tests/parity/test_golden.py, which reads the numbers of the method's reference implementation."""
    spec = importlib.util.spec_from_file_location("lattice_golden_cases", GOLDEN)
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    return reader


def _golden(found: dict[str, Any], *, name: str, device: torch.device) -> None:
    reader, imports = golden_reader(), {"imports": [str(GOLDEN.with_name("layer_mixture.py"))]}
    manifest, tensors = reader.load_case(name)
    with tempfile.TemporaryDirectory() as folder:
        source = reader.hf_folder(Path(folder), manifest["arch"], manifest["config"])
        model = lattice.from_pretrained(source, reader.recurrence_of(manifest), overrides=imports)
        _golden_case(found, model.to(device), manifest, tensors)


def _golden_case(
    found: dict[str, Any], model: lattice.LanguageModel, manifest: Any, tensors: dict[str, Tensor]
) -> None:
    device = next(model.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    ids_BL, mask_BL = tensors["input_ids"], tensors.get("attention_mask")
    real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    targets_BL = torch.nn.functional.pad(tensors["labels"][:, 1:], (0, 1), value=-100)
    logits_BLV = model(ids_BL, attention_mask=mask_BL).logits
    loss = model(ids_BL, attention_mask=mask_BL, targets=targets_BL).loss
    assert loss is not None
    loss.backward()
    norms = {name: norm for name, norm in manifest["grad_norm"].items() if norm is not None}
    errors = [
        abs(float(model.decoder.get_parameter(name).grad.norm()) / norm - 1)  # type: ignore[union-attr]
        for name, norm in norms.items()
    ]
    # A GPU adds in another order. An addition in float32 rounds by up to 6e-8 of the sum, and the errors of n
    # of them come to about the root of n as much: 1e-5 allows for tens of thousands.
    within(
        found,
        {"logits": 1e-5, "loss": 1e-5, "gradient_norms": 1e-5},
        logits=float((logits_BLV.detach()[real_BL] - tensors["logits"][real_BL]).abs().max()),
        loss=abs(loss.item() / manifest["loss"] - 1),
        gradient_norms=max(errors),
    )


def recordings(options: argparse.Namespace) -> Cases:
    """Decoding by CUDA graphs against decoding as it is written, in rows of several lengths."""
    given = {"device": options.device, "length": 40 if options.tiny else 300}
    for precision in ("fp32", "bf16"):
        for thoughts in (0, 2):
            labels: dict[str, Any] = {"thoughts": thoughts, "precision": precision}
            yield {"case": "recorded", **labels}, functools.partial(_recorded, **labels, **given)
    if options.device.type == "cuda":
        yield {"case": "not recordable"}, functools.partial(_not_recordable, **given)


def _recorded(
    found: dict[str, Any], *, thoughts: int, precision: str, device: torch.device, length: int
) -> None:
    recipe = recipe_of("tiny", thoughts, device=device, precision=precision)
    model, computes = build(recipe, device), recipe.component("precision")
    ids_BL = some_ids(model, 3, length)
    present_BL = torch.arange(length, device=device) >= torch.tensor([[0], [9], [30]], device=device)
    with mock.patch.object(replay, "AFTER", sys.maxsize):
        reference, _ = decoded(model, ids_BL, present_BL, computes)
    value, replays = decoded(model, ids_BL, present_BL, computes)
    assert replays.recorded or device.type != "cuda", "nothing was recorded"
    found["recorded"] = replays.recorded
    within(found, {"logits": 1e-5 if precision == "fp32" else 0.03}, logits=difference(value, reference))


def _not_recordable(found: dict[str, Any], *, device: torch.device, length: int) -> None:
    """A layer that waits for the GPU, which a graph cannot: it is said, and decoding goes on."""
    model = build(recipe_of("tiny", 1, device=device, precision="fp32"), device)
    ids_BL, computes = some_ids(model, 3, length), precision_of("fp32")
    reference, _ = decoded(model, ids_BL, None, computes)
    norm: Any = model.decoder.blocks[0].input_layernorm
    forward = type(norm).forward
    waits = {"forward": lambda self, x: forward(self, x * x.norm().cpu() / x.norm())}
    norm.__class__ = type("Waits", (type(norm),), waits)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value, replays = decoded(model, ids_BL, None, computes)
    found["said"] = [str(one.message) for one in said]
    assert not replays.recorded
    assert any("without CUDA graphs" in one for one in found["said"]), "nothing was said"
    within(found, {"logits": 1e-5}, logits=difference(value, reference))


def decoded(
    model: lattice.LanguageModel, ids_BL: Tensor, present_BL: Tensor | None, precision: Precision
) -> tuple[Tensor, replay.Replays]:
    """Logits after each token, where it is no padding."""
    cache, logits = model.cache(), list[Tensor]()
    with precision.autocast(ids_BL.device):
        for at in range(ids_BL.shape[1]):
            present_B1 = None if present_BL is None else present_BL[:, at : at + 1]
            logits.append(model.step(ids_BL[:, at : at + 1], cache, present_B1))
    logits_BLV = torch.stack(logits, 1)
    return logits_BLV if present_BL is None else logits_BLV[present_BL], cache.replays


def attention(options: argparse.Namespace) -> Cases:
    """Flash attention in bfloat16 against float32, and block masks against booleans."""
    given = {"device": options.device, "length": 64 if options.tiny else 1024}
    for thoughts in (0, 1):
        yield {"case": "flash", "thoughts": thoughts}, functools.partial(_flash, thoughts=thoughts, **given)
    for seen in ("all", "own", "last"):
        for window in (None, given["length"] // 4):
            mask = {"kind": "document", "thoughts": seen, "window": window}
            for level, compared in (("attention", _block_mask), ("model", _masked_model)):
                labels = {"case": "block mask", "level": level, **mask}
                yield labels, functools.partial(compared, mask=mask, **given)


def _flash(found: dict[str, Any], *, thoughts: int, device: torch.device, length: int) -> None:
    exact, rounded = (recipe_of("tiny", thoughts, device=device, precision=name) for name in ("fp32", "bf16"))
    model = build(exact, device)
    ids_BL = some_ids(model, 2, length)
    reference = computed(model, ids_BL, exact.component("precision"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        value = computed(model, ids_BL, rounded.component("precision"))
    compare(found, value, reference, logits=0.03, gradients=0.1)


def _documents(rows: int, length: int, device: torch.device) -> Tensor:
    """Two documents in the first row, three in the others."""
    index_L = torch.arange(length, device=device)
    return torch.stack([index_L // (length // (2 if row == 0 else 3) + 1) for row in range(rows)])


def _block_mask(found: dict[str, Any], *, mask: dict[str, Any], device: torch.device, length: int) -> None:
    """On a GPU with gradients; elsewhere FlexAttention has none."""
    document = Document(thoughts=mask["thoughts"], window=mask["window"])
    documents_BL = _documents(2, length, device)
    slots = Slots.interleaved(Tokens.of(torch.zeros_like(documents_BL), documents_BL=documents_BL), stages=2)
    rotary = Rotary(
        torch.ones(1, 2 * length, 1, 32, device=device), torch.zeros(1, 2 * length, 1, 32, device=device)
    )
    generator = torch.Generator().manual_seed(0)
    query_BSHE, key_BGSE, value_BGSE = (
        torch.randn(size, generator=generator).to(device)
        for size in ((2, 2 * length, 4, 32), (2, 2, 2 * length, 32), (2, 2, 2 * length, 32))
    )
    allowed_BSS = attention_mask.allowed(document, slots, slots)
    assert allowed_BSS is not None
    ways = {
        "booleans": AttentionMask(causal=False, allowed=allowed_BSS[:, None]),
        "blocks": AttentionMask(causal=False, blocks=attention_mask.block_mask(document, slots, slots)),
    }
    results: dict[str, list[Tensor]] = {}
    for way, given in ways.items():
        inputs = [
            one.clone().requires_grad_(device.type == "cuda") for one in (query_BSHE, key_BGSE, value_BGSE)
        ]
        attended_BSE = attend(inputs[0], inputs[1], inputs[2], rotary, given)
        results[way] = [attended_BSE]
        if device.type == "cuda":
            results[way] += torch.autograd.grad(attended_BSE.square().sum(), inputs)
    errors = [difference(*pair) for pair in zip(results["blocks"], results["booleans"], strict=True)]
    # FlexAttention's kernels may multiply in TF32 whatever the setting.
    within(found, {"attended": 2e-3, "gradients": 5e-3}, attended=errors[0], gradients=max(errors))


def _masked_model(found: dict[str, Any], *, mask: dict[str, Any], device: torch.device, length: int) -> None:
    """The whole way, where a GPU takes blocks and no other device does."""
    recipe = recipe_of("tiny", 1, device=device, precision="fp32").table()
    recipe["mask"] = {name: value for name, value in mask.items() if value is not None}
    model = build(lattice.load_recipe(recipe), device)
    ids_BL, documents_BL = some_ids(model, 2, length), _documents(2, length, device)
    run = functools.partial(computed, model, ids_BL, precision_of("fp32"), documents=documents_BL)
    with mock.patch.object(attention_mask, "BLOCKS_FROM", sys.maxsize):
        reference = run()
    compare(found, run(), reference, logits=5e-3, gradients=2e-2)


def precision_of(kind: str) -> Precision:
    precision: Precision = lattice.load_recipe({"precision": {"kind": kind}}).component("precision")
    return precision


def formats(options: argparse.Namespace) -> Cases:
    """Compiled layers against eager ones, and float8 against bfloat16."""
    given = {"device": options.device, "length": 64 if options.tiny else 512}
    for thoughts in (1,) if options.tiny else (0, 1):
        labels: dict[str, Any] = {"thoughts": thoughts}
        yield {"case": "compiled", **labels}, functools.partial(_compiled, **labels, **given)
        for scaling in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
            for checkpointing in ("none", "selective"):
                labels = {"recipe": scaling, "thoughts": thoughts, "checkpointing": checkpointing}
                yield {"case": "float8", **labels}, functools.partial(_float8, labels=labels, **given)


def _compiled(found: dict[str, Any], *, thoughts: int, device: torch.device, length: int) -> None:
    recipe = recipe_of("tiny", thoughts, device=device)
    precision = recipe.component("precision")
    model = build(recipe, device)
    ids_BL = some_ids(model, 2, length)
    logits_BLV, loss, gradients = computed(model, ids_BL, precision)
    compile_layers(model, device)
    value = computed(model, ids_BL, precision)
    compare(found, value, (logits_BLV, loss, gradients), logits=0.03, gradients=0.1)


def _float8(found: dict[str, Any], *, labels: dict[str, Any], device: torch.device, length: int) -> None:
    table = recipe_of(
        "tiny", labels["thoughts"], device=device, checkpointing=labels["checkpointing"]
    ).table()
    emulate = device.type != "cuda"
    table["precision"] = {
        "kind": "float8",
        "recipe": labels["recipe"],
        "min_features": 64,
        "emulate": emulate,
    }
    recipe = lattice.load_recipe(table)
    plain, model = build(recipe_of("tiny", labels["thoughts"], device=device), device), build(recipe, device)
    model.load_state_dict(plain.state_dict())
    ids_BL = some_ids(model, 2, length)
    reference = computed(plain, ids_BL, precision_of("bf16"))
    value = computed(model, ids_BL, recipe.component("precision"))
    with recipe.component("precision").autocast(device):  # passes over one token
        assert lattice.generate(model, ids_BL[:1, :3], 2).shape == (1, 5)
    compare(found, value, reference, logits=0.08, gradients=0.2)


def computed(model: lattice.LanguageModel, ids_BL: Tensor, precision: Precision, **batch: Tensor) -> Any:
    """Logits without gradients, the loss, and its gradients by name."""
    model.zero_grad()
    with precision.autocast(ids_BL.device):
        with torch.no_grad():
            logits_BLV = model(ids_BL, **batch).logits
        loss = model(ids_BL, targets=ids_BL.roll(-1, 1), **batch).loss
    assert loss is not None
    loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return logits_BLV, loss, gradients


def compare(found: dict[str, Any], value: Any, reference: Any, logits: float, gradients: float) -> None:
    within(
        found,
        {"logits": logits, "loss": logits, "gradients": gradients},
        logits=difference(value[0], reference[0]),
        loss=difference(value[1], reference[1]),
        gradients=max(difference(value[2][name], one) for name, one in reference[2].items()),
    )


def difference(value: Tensor, reference: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    value, reference = value.detach().float(), reference.detach().float()
    return float((value - reference).norm() / reference.norm())


def within(found: dict[str, Any], limits: dict[str, float], **values: float) -> None:
    """Notes the values; raises AssertionError where one is above its limit or no number."""
    found |= {**values, "limits": limits}
    above = [name for name, value in values.items() if not value <= limits[name]]
    assert not above, f"{', '.join(above)} above the limit"
