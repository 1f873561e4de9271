"""The reference's side of benchmarks/random_parity.py, for an interpreter that has its transformers.

Draws cases and writes each as a Hugging Face directory with `case.json` (what was drawn, the loss) and
`case.safetensors` (ids, labels, attention mask, logits, gradients; for decoding the tokens).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from reference_worker import MODELS
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, LlamaConfig
from worker_protocol import module

ARCHITECTURES = {
    "gpt_neox": (GPTNeoXConfig, "GPTNeoXForCausalLM", "embed_out.weight"),
    "llama": (LlamaConfig, "LlamaForCausalLM", "lm_head.weight"),
}
FILES = {
    ("gpt_neox", "latent_thoughts"): "modeling_gpt_neox.py",
    ("llama", "latent_thoughts"): "modeling_llama.py",
    ("gpt_neox", "softmax feedback"): "modeling_gpt_neox.py",
    ("llama", "softmax feedback"): "modeling_llama.py",
    ("llama", "decoding"): "modeling_llama.py",
    ("gpt_neox", "loop"): "modeling_gpt_neox_addhidden_weightshare.py",
    ("llama", "loop"): "modeling_llama_loop.py",
    ("gpt_neox", "pause"): "modeling_gpt_neox_addpausetoken.py",
    ("llama", "pause"): "modeling_llama_pause.py",
    ("gpt_neox", "hidden_ponder"): "modeling_gpt_neox_addhidden.py",
    ("llama", "ponder"): "modeling_llama_orin.py",
}
"""What the reference has, and where."""

ALWAYS_SCALED = {("gpt_neox", "loop"), ("llama", "loop"), ("llama", "pause")}
"""Those that scale embeddings whatever `scale_embeds` says."""


def drawn(rng: random.Random, architecture: str) -> dict[str, Any]:
    """A small model of sizes and options that both sides have."""
    heads = rng.choice([1, 2, 4])
    sizes = {
        "hidden_size": heads * rng.choice([8, 16, 24]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "intermediate_size": rng.choice([32, 96]),
        "vocab_size": rng.choice([50, 131]),
        "max_position_embeddings": 64,
        "tie_word_embeddings": rng.random() < 0.4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if architecture == "gpt_neox":
        return sizes | {
            "rotary_pct": rng.choice([0.25, 0.5, 1.0]),
            "rotary_emb_base": rng.choice([500, 10_000]),
            "use_parallel_residual": rng.random() < 0.5,
            "attention_bias": rng.random() < 0.6,
            "layer_norm_eps": rng.choice([1e-5, 1e-3]),
            "hidden_act": rng.choice(["gelu", "relu", "silu"]),
        }
    return sizes | {
        "num_key_value_heads": rng.choice([count for count in (1, 2, 4) if heads % count == 0]),
        "rope_theta": rng.choice([300.0, 10_000.0]),
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "attention_bias": rng.random() < 0.3,
        "mlp_bias": rng.random() < 0.3,
        "hidden_act": "silu",
    }


def built(case: dict[str, Any], config: dict[str, Any], seed: int) -> Any:
    """The reference's model, its weights and biases moved so that none is 0 or 1."""
    configuration, name, _ = ARCHITECTURES[case["architecture"]]
    file = FILES[case["architecture"], case["kind"]]
    reference = configuration(**config, attn_implementation="sdpa")
    reference.recurrent_model = True
    reference.num_latent_thoughts, reference.num_jacobi_iterations = case["count"], case["iterations"]
    reference.random_jacobi_iterations, reference.scale_embeds = False, case["scaled"]
    reference.interpolation = case["kind"] in ("softmax feedback", "ponder", "hidden_ponder")
    reference.pause_token_id = config["vocab_size"] - 1
    torch.manual_seed(seed)
    model = getattr(module(Path(file).stem, Path(sys.argv[1]) / MODELS / file), name)(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(rng: random.Random, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and attention mask (B, L): rows of several lengths, padded right, some labels left out."""
    rows, length = rng.randrange(1, 4), rng.randrange(3, 17)
    ids_BL = torch.randint(1, vocab_size, (rows, length))
    mask_BL = torch.ones_like(ids_BL)
    if rng.random() < 0.4:
        for row_L in mask_BL:
            row_L[rng.randrange(max(2, length // 2), length + 1) :] = 0
    labels_BL = ids_BL.masked_fill(mask_BL == 0, -100)
    if rng.random() < 0.5:
        out_BL = torch.rand(labels_BL.shape) < 0.3
        out_BL[:, 1] = False  # a target at least
        labels_BL = labels_BL.masked_fill(out_BL, -100)
    return ids_BL, labels_BL, mask_BL


def computed(
    model: Any, rng: random.Random, case: dict[str, Any], vocab_size: int
) -> dict[str, torch.Tensor]:
    """What the reference makes of the case; the loss is added to it."""
    if case["kind"] == "decoding":
        case["new_tokens"] = rng.randrange(1, 10)
        prompt_BL = torch.randint(1, vocab_size, (1, rng.randrange(1, 9)))
        model.eval().generation_config.eos_token_id = None
        tokens_BL = model.generate(
            prompt_BL,
            attention_mask=torch.ones_like(prompt_BL),
            max_new_tokens=case["new_tokens"],
            do_sample=False,
            pad_token_id=0,
        )
        return {"ids": prompt_BL, "tokens": tokens_BL}
    ids_BL, labels_BL, mask_BL = batch(rng, vocab_size)
    output = model.train()(input_ids=ids_BL, labels=labels_BL, attention_mask=mask_BL)
    output.loss.backward()
    case["loss"] = output.loss.item()
    gradients = {
        f"grad.{name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {
        "ids": ids_BL,
        "labels": labels_BL,
        "mask": mask_BL,
        "logits": output.logits.detach(),
        **gradients,
    }


def main() -> None:
    out, cases, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng = random.Random(seed)
    torch.set_num_threads(1)
    kinds = list(FILES)
    for number in range(cases):
        architecture, kind = kinds[number % len(kinds)]
        case: dict[str, Any] = {
            "architecture": architecture,
            "kind": kind,
            "count": rng.randrange(1 if kind == "softmax feedback" else 0, 5),
            "iterations": rng.randrange(6),
            "scaled": (architecture, kind) in ALWAYS_SCALED or rng.random() < 0.7,
        }
        config = drawn(rng, architecture)
        model = built(case, config, rng.randrange(10**6))
        tensors = computed(model, rng, case, config["vocab_size"])
        folder = out / f"{number:04d}"
        folder.mkdir()
        weights = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            del weights[ARCHITECTURES[architecture][2]]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "case.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, "model_type": architecture}))
        (folder / "case.json").write_text(json.dumps({**case, "config": config}))


if __name__ == "__main__":
    main()
