"""The multiplier of the token embeddings."""

from __future__ import annotations


def check_embed_scale(embed_scale: float | None) -> None:
    if embed_scale is not None and embed_scale <= 0:
        raise ValueError(f"embed_scale = {embed_scale}: must be greater than 0")
