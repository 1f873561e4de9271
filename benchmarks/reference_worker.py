"""The reference's side of benchmarks/against_reference.py, for an interpreter that has its transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, LlamaConfig
from worker_protocol import NEW_TOKENS, module, serve

MODELS = Path("src/llamafactory/model/modeling")


def build() -> Callable[[], None]:
    folder, mode, *arguments = sys.argv[1:]
    return (training if mode == "train" else decoding)(Path(folder), *arguments)


def training(folder: Path, thoughts: str, precision: str, batch: str, length: str) -> Callable[[], None]:
    """A step of Pythia-70m's shape."""
    reference = module("reference", folder / MODELS / "modeling_gpt_neox.py")
    config = GPTNeoXConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=50_304,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        use_parallel_residual=True,
        attn_implementation="sdpa",
    )
    config.num_latent_thoughts, config.num_jacobi_iterations = int(thoughts), 3
    config.random_jacobi_iterations, config.interpolation, config.scale_embeds = False, False, True
    model = reference.GPTNeoXForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids_BL = torch.randint(50_000, (int(batch), int(length)), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(folder: Path, thoughts: str, precision: str, batch: str, length: str) -> Callable[[], None]:
    """Greedy decoding after a prompt, of the shape of recipes/llama_125m.toml."""
    reference = module("reference", folder / MODELS / "modeling_llama.py")
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=2048,
        vocab_size=50_304,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )
    config.recurrent_model = True
    config.num_latent_thoughts, config.num_jacobi_iterations = int(thoughts), 3
    config.random_jacobi_iterations, config.interpolation, config.scale_embeds = False, False, True
    model = reference.LlamaForCausalLM(config).eval()
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    ids_BL = torch.randint(50_000, (int(batch), int(length)), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.generate(
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    return step


if __name__ == "__main__":
    serve(build)
