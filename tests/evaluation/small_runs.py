"""Small finished runs to evaluate and compare."""

import lattice
from lattice import cli

RECIPE = {
    "run": {"steps": 4, "batch_tokens": 128, "sequence_tokens": 16, "device": "cpu"},
    "backbone": {
        "kind": "gpt_neox",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 260,
        "max_position_embeddings": 48,
    },
    "optimizer": {"kind": "adamw", "lr": 1e-2},
    "data": {"kind": "embedded", "megabytes": 0.3, "validation_fraction": 0.2},
    "evaluators": {"validation": {"kind": "perplexity", "every": 2, "max_tokens": 256}},
    "checkpoint": {"kind": "dcp", "every": 100},
}
THINKING = {"kind": "latent_thoughts", "thoughts": 2, "jacobi": {"train": [1, 2], "eval": 2}}
QUESTIONS = [
    {"q": "The sky is", "options": ["blue", "green and wet", "x"], "gold": 0},
    {"q": "Two and two make", "options": ["five", "four"], "gold": 1},
    {"q": "", "options": ["a", "b", "c", "def"], "gold": 3},
    {"q": "for i in range(10):", "options": ["\n    print(i)", "pass"], "gold": 0},
]
TEXTS = [{"text": "def f(x):\n    return x\n"}, {"text": "one two three " * 12}, {"text": "é"}]


def train(folder, **tables):
    lattice.train({**RECIPE, **tables}, out=folder)
    return folder


def command(*arguments):
    """The exit code of a command."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0
