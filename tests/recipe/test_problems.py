"""Every way in which a recipe can be wrong, each named by its line."""

import datetime

import pytest

from lattice import registry
from lattice.recipe import RecipeError, load_recipe
from tests.recipe.texts import BACKBONE

DAY = datetime.date(2020, 1, 1)


def test_all_problems_at_once_each_with_its_line(problems):
    found = problems(
        BACKBONE  # lines 1 to 5
        + """hiden_size = 3
[recurrence]
kind = "latent_thougths"
[run]
steps = "many"
seed = -1

[optimzer]
kind = "adamw"
[schedule]
warmup = 0.5
kind = "cosine"
decay = 1
[mask]
kind = "causal"
[evaluators.text]
kind = "sample"
"""
    )
    assert {one.split(" Known")[0] for one in found} == {
        "bad.toml:13: unknown table 'optimzer'; did you mean 'optimizer'?",
        "bad.toml:6: backbone.hiden_size: unknown option; did you mean 'hidden_size'?",
        "bad.toml:8: recurrence.kind: kind 'latent_thougths' of role 'recurrence' does not exist; did you "
        "mean 'latent_thoughts'?",
        'bad.toml:10: run.steps = "many": input should be a valid integer',
        "bad.toml:18: schedule.decay: unknown option.",
        "bad.toml:21: evaluators.text.prompt: missing",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi = { trian = [1, 2] }\n",
         "bad.toml:3: recurrence.jacobi.trian: unknown option; did you mean 'train'? Known: train, eval"),
        ("[recurrence]\nkind = 'latent_thoughts'\n[recurrence.jacobi]\n\neval = -1\n",
         "bad.toml:5: recurrence.jacobi.eval = -1: must be at least 0"),
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi.train = [4, 2]\n",
         "bad.toml:3: recurrence.jacobi.train = [4, 2]: must be a range [low, high] with 0 <= low <= high"),
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi.train = [4]\n",
         "bad.toml:3: recurrence.jacobi.train = [4]: has too few values"),
        ("[recurrence]\nkind = 'latent_thoughts'\nthoughts = 1.0\n",
         "bad.toml:3: recurrence.thoughts = 1.0: input should be a valid integer"),
        ("[recurrence]\nthoughts = 1\nkind = 'none'\n",
         "bad.toml:2: recurrence.thoughts: unknown option. Known: initializer_range"),
        ("[backbone]\nkind = 'llama'\nrope_theta = 0.0\n",
         "bad.toml:3: backbone.rope_theta = 0.0: must be greater than 0"),
        ("[backbone]\nkind = 'llama'\nrms_norm_eps = -1.0\n",
         "bad.toml:3: backbone.rms_norm_eps = -1.0: must be at least 0"),
        ("[backbone]\nkind = 'gpt_neox'\nrotary_emb_base = -5.0\n",
         "bad.toml:3: backbone.rotary_emb_base = -5.0: must be greater than 0"),
        ("[backbone]\nkind = 'gpt_neox'\nlayer_norm_eps = -1.0\n",
         "bad.toml:3: backbone.layer_norm_eps = -1.0: must be at least 0"),
        ("[run]\n\nbatch_tokens = 100\nsequence_tokens = 30\n",
         "bad.toml:3: run.batch_tokens = 100: must be a multiple of sequence_tokens = 30"),
        ("[run]\nseed = true\n", "bad.toml:2: run.seed = true: input should be a valid integer"),
        ("[run]\nseed = '3'\n", 'bad.toml:2: run.seed = "3": input should be a valid integer'),
        ("[run]\nkind = 'long'\n",
         "bad.toml:2: run.kind: unknown option. Known: seed, steps, batch_tokens, sequence_tokens, "
         "micro_batch, device, deterministic, init_from, timeout, log_every"),
        ("run = 3\n", "bad.toml:1: [run] must be a table, not 3"),
        ("evaluators = 3\n", "bad.toml:1: [evaluators] must hold named tables, [evaluators.name]"),
        ("mask = 'causal'\n", "bad.toml:1: [mask] must be a table, not 'causal'"),
        ("[backbone]\nhidden_size = 3\n", "bad.toml:1: [backbone] has no `kind`; known: gpt_neox, llama"),
        ("[backbone]\n\nkind = 3\n",
         "bad.toml:3: backbone.kind = 3: must be a string; known: gpt_neox, llama"),
        ("[backbone]\nkind = ['llama']\n",
         'bad.toml:2: backbone.kind = ["llama"]: must be a string; known: gpt_neox, llama'),
        ("[backbone]\nkind = 'gpt_neox'\n\nhidden_size = 2020-01-01\n",
         'bad.toml:4: backbone.hidden_size = "2020-01-01": must not hold a date'),
        ("[recurrence]\nkind = 'latent_thoughts'\njacobi = { train = [1, 07:32:00] }\n",
         'bad.toml:3: recurrence.jacobi = {"train": [1, "07:32:00"]}: must not hold a time'),
        ("[run]\nsteps = \n", "bad.toml:2: no valid TOML: Invalid value (at line 2, column 9)"),
        ("[run]\nsteps = 1\n\nsteps = 2\n",
         "bad.toml:4: no valid TOML: Cannot overwrite a value (at line 4, column 10)"),
        (b"[run]\nsteps = 1 # \xff\n", "bad.toml: not UTF-8 at byte 18"),
        ("imports = 'mine.py'\n", "bad.toml:1: imports = 'mine.py': must be a list of strings"),
        ("\nextends = [3]\n", "bad.toml:2: extends = [3]: must be a list of file names"),
    ],
)  # fmt: skip
def test_the_message_for(text, message, problems):
    # Other tests register backbones of their own.
    backbones = ", ".join(registry.kinds("backbone"))
    assert problems(text) == [message.replace("gpt_neox, llama", backbones)]


def test_an_option_of_a_type_that_no_recipe_holds(problems, write):
    write(
        "typed.py",
        """
from dataclasses import dataclass
import torch
from lattice import register
from lattice.components.recurrence.none import NoRecurrence

@register("recurrence", "typed")
@dataclass(frozen=True, kw_only=True)
class Typed(NoRecurrence):
    dtype: torch.dtype | None = None
""",
    )
    (found,) = problems("imports = ['./typed.py']\n[recurrence]\nkind = 'typed'\n")
    assert found.startswith(
        "bad.toml:3: recurrence.dtype: an option of Typed cannot be of type torch.dtype | None"
    )
    assert "must be bool, int" in found


def test_every_rule_of_the_run_table_names_its_line(problems):
    for line in ("steps = 0", "batch_tokens = -256", "sequence_tokens = 0", "log_every = 0", "seed = -1"):
        key = line.split()[0]
        assert problems(f"[run]\n# a comment\n{line}\n")[0].startswith(f"bad.toml:3: run.{key} = "), line
    assert problems("[run]\nmicro_batch = 3\n") == [
        "bad.toml:2: run.micro_batch = 3: must divide the 32 sequences of a batch "
        "(batch_tokens / sequence_tokens)"
    ]


def test_a_dict_is_checked_the_same_way():
    with pytest.raises(RecipeError) as caught:
        load_recipe({"run": {"stepz": 3}, "backbone": {"kind": "gpt_neox", "hidden_size": DAY}})
    assert [one[: one.index(":", 6)] for one in caught.value.problems] == [
        "dict: run.stepz",
        'dict: backbone.hidden_size = "2020-01-01"',
    ]
    with pytest.raises(RecipeError, match="dict: imports = 'mine': must be a list"):
        load_recipe({"imports": "mine"})
