"""The reference's side of benchmarks/against_reference.py, for an interpreter that has its transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPTNeoXConfig
from worker_protocol import serve

MODEL = Path("src/llamafactory/model/modeling/modeling_gpt_neox.py")


def build() -> Callable[[], None]:
    folder, thoughts, precision, batch, length = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("reference", Path(folder) / MODEL)
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = reference
    spec.loader.exec_module(reference)
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


if __name__ == "__main__":
    serve(build)
