"""Parity with the numbers that the method's reference implementation computed (tests/golden/README.md).

Logits to 1e-5 absolute, loss to 1e-6, every gradient norm to 1e-5 relative, in float32.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import lattice

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(
    str(path.relative_to(GOLDEN).with_suffix(""))
    for pattern in ("*/vanilla*.json", "*/ours_*.json", "*/loop*.json", "*/pause*.json", "*/ponder*.json")
    for path in GOLDEN.glob(pattern)
)
GENERATE = sorted(path.stem for path in (GOLDEN / "llama").glob("generate_*.json"))
SEQUENTIAL = sorted(
    str(path.relative_to(GOLDEN).with_suffix("")) for path in GOLDEN.glob("*/prop_sequential_k*.json")
)
# The weights are drawn: their config.json, of a plain model, says nothing of the scale that was theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.*multiplies the embeddings by:UserWarning")


def hf_folder(folder, arch, config):
    """The golden weights as a Hugging Face directory, which is how a user brings them."""
    (folder / "config.json").write_text(json.dumps({**config, "model_type": arch}))
    (folder / "model.safetensors").symlink_to(GOLDEN / arch / "weights.safetensors")
    return folder


def load_case(case):
    manifest = json.loads((GOLDEN / f"{case}.json").read_text())
    return manifest, load_file(GOLDEN / f"{case}.safetensors")


def recurrence_of(manifest):
    count, extra = manifest["K"], manifest["extra_config"]
    match manifest["method"], manifest["arch"]:
        case "vanilla", _:
            return {"kind": "none"}
        case "loop", _:
            return {"kind": "loop", "loops": count}
        case "pause", _:
            return {"kind": "pause", "pauses": count, "pause_token_id": extra["pause_token_id"]}
        case "ponderlm_v1", _:
            return {"kind": "ponder", "steps": count}
        case "ponderlm", "gpt_neox" if extra.get("hidden_layer_num") == 2:  # the last hidden state's mixture
            return {"kind": "ponder", "steps": count, "embed_scale": 1.0}
        case "ponderlm", "gpt_neox" if extra.get("hidden_layer_num") == 1:  # every layer's
            return {"kind": "layer_mixture", "steps": count}
        case "ponderlm", "gpt_neox":  # feeds the hidden state, whatever its name says
            return {"kind": "hidden_ponder", "steps": count}
        case "ponderlm", "llama":
            accumulate = extra.get("residual_interpolated_embeds", False)
            return {"kind": "ponder", "steps": count, "accumulate": accumulate}
    softmax = {"feedback": "softmax"} if extra["interpolation"] else {}
    if extra.get("interpolation_use_topk"):
        softmax["top_k"] = 100
    return {
        "kind": "latent_thoughts",
        "thoughts": count,
        "jacobi": {"eval": manifest["jacobi_iterations"]},
        **softmax,
    }


def test_every_case_is_here():
    assert len(CASES) == 49
    assert len(GENERATE) == 10
    assert len(SEQUENTIAL) == 6


@pytest.mark.parametrize("checkpointing", ["none", "block", "pass"])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case, checkpointing, tmp_path):
    manifest, golden = load_case(case)
    model = lattice.from_pretrained(
        hf_folder(tmp_path, manifest["arch"], manifest["config"]),
        recurrence_of(manifest),
        overrides={
            "activation_checkpoint": {"kind": checkpointing},
            "imports": [str(Path(__file__).with_name("layer_mixture.py"))],
        },
    )
    mask = golden.get("attention_mask")
    logits = model(golden["input_ids"], attention_mask=mask).logits

    real = torch.ones_like(golden["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], golden["logits"][real], atol=1e-5, rtol=0)

    targets = F.pad(golden["labels"][:, 1:], (0, 1), value=-100)
    loss = model(golden["input_ids"], attention_mask=mask, targets=targets).loss
    assert loss.item() == pytest.approx(manifest["loss"], abs=1e-6)
    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(reference.item(), abs=1e-6)

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.decoder.named_parameters()}
    # The reference carries a parameter that it never uses, without a gradient.
    norms = {name: norm for name, norm in manifest["grad_norm"].items() if norm is not None}
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-5), name
    for name, gradient in golden.items():
        if name.startswith("grad."):
            torch.testing.assert_close(gradients[name.removeprefix("grad.")], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", SEQUENTIAL)
def test_strictly_sequential_evaluation(case, tmp_path):
    manifest, golden = load_case(case)
    config = json.loads((GOLDEN / f"{case.split('/')[0]}/ours_k1_j3.json").read_text())["config"]
    model = lattice.from_pretrained(
        hf_folder(tmp_path, manifest["arch"], config), {"kind": "latent_thoughts", "thoughts": manifest["K"]}
    )
    ids = golden["input_ids"]
    cache = lattice.cache.KVCache(model.shape.num_layers)
    steps = [model.step(ids[:, at : at + 1], cache) for at in range(ids.shape[1])]
    reference = next(value for name, value in golden.items() if "logits" in name)
    torch.testing.assert_close(torch.stack(steps, 1), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", GENERATE)
def test_greedy_cached_decoding(case, tmp_path):
    """The reference's prefill is parallel with J refinements, then it decodes in sequence."""
    manifest, _ = load_case(f"llama/{case}")
    recurrence = {
        "kind": "latent_thoughts",
        "thoughts": manifest["K"],
        "jacobi": {"eval": manifest["prefill_jacobi_iterations"]},
    }
    model = lattice.from_pretrained(hf_folder(tmp_path, "llama", manifest["config"]), recurrence)
    sequences = torch.tensor(manifest["sequences"])
    prompt = sequences[:, : manifest["prompt_len"]]
    parallel = lattice.generate(model, prompt, manifest["new_tokens"], parallel_prefill=True)
    assert parallel.tolist() == sequences.tolist()
    if manifest["prefill_jacobi_iterations"] >= manifest["K"] * (manifest["prompt_len"] - 1):
        assert lattice.generate(model, prompt, manifest["new_tokens"]).tolist() == sequences.tolist()
