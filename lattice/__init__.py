"""lattice: pretraining language models that think before every token.

import lattice

model = lattice.build_model({"backbone": {"kind": "gpt_neox"}, "recurrence": {"kind": "latent_thoughts"}})
logits = model(input_ids).logits
"""

from lattice.build import build_model
from lattice.generate import generate
from lattice.load import codec_of, load
from lattice.model import LanguageModel, Output
from lattice.pretrained import from_pretrained, save_pretrained
from lattice.recipe import Recipe, RecipeError, load_recipe
from lattice.registry import register
from lattice.train import train

__version__ = "0.1.0"
__all__ = [
    "LanguageModel",
    "Output",
    "Recipe",
    "RecipeError",
    "build_model",
    "codec_of",
    "from_pretrained",
    "generate",
    "load",
    "load_recipe",
    "register",
    "save_pretrained",
    "train",
]
