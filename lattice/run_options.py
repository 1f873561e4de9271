"""The `[run]` table: what belongs to the run and to no component."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Length, batch and seed of a training run."""

    seed: int = 0
    """Of the initial weights, the data order and every draw."""
    steps: int = 1000
    """Optimizer steps."""
    batch_tokens: int = 8192
    """Tokens of an optimizer step, over all ranks."""
    sequence_tokens: int = 256
    """Tokens of a sequence, before the recurrence adds slots."""
    micro_batch: int | None = None
    """Sequences a rank sends through the model at once; all of its share if not given. Gradients
    accumulate to batch_tokens."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, …"""
    deterministic: bool = False
    """On a GPU only kernels that give the same bits each time: slower; an operation that has none raises."""
    init_from: str | None = None
    """Hugging Face directory whose weights a fresh run starts from; newly drawn ones if not given. A run that
    goes on reads its own checkpoint instead."""
    timeout: float = 1800.0
    """Seconds after which a rank that waits for another gives up, and says for which."""
    log_every: int = 10
    """Steps between lines on a terminal that is no TTY; metrics.jsonl holds every step."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "sequence_tokens", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout = {self.timeout}: must be greater than 0")
        if self.init_from is not None and not self.init_from:
            raise ValueError("init_from = '': must be a Hugging Face directory")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: must be at least 0 and less than 2**63")
        if self.batch_tokens % self.sequence_tokens:
            raise ValueError(
                f"batch_tokens = {self.batch_tokens}: must be a multiple of "
                f"sequence_tokens = {self.sequence_tokens}"
            )
        if self.micro_batch is not None and (self.micro_batch < 1 or self.sequences % self.micro_batch):
            raise ValueError(
                f"micro_batch = {self.micro_batch}: must divide the {self.sequences} sequences of a batch "
                f"(batch_tokens / sequence_tokens)"
            )

    @property
    def sequences(self) -> int:
        """Sequences of an optimizer step, over all ranks."""
        return self.batch_tokens // self.sequence_tokens
