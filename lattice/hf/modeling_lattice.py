"""Runs this directory's model in transformers. Everything it does is in the package `lattice`."""

from typing import Any

from lattice.hf.modeling import Config, ForCausalLM


class LatticeConfig(Config):
    def __init__(self, **options: Any) -> None:  # transformers 5 makes a dataclass of a class without one
        super().__init__(**options)


class LatticeForCausalLM(ForCausalLM):
    config_class = LatticeConfig
