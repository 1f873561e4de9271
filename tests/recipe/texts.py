"""Recipes that several tests read."""

BACKBONE = '[backbone]\nkind = "gpt_neox"\nhidden_size = 16\nnum_attention_heads = 2\nnum_hidden_layers = 1\n'
WRITTEN = """\
# line 1
run.seed = 1                         # line 2: a dotted key
run."steps" = 12

[ backbone ]   # a header with spaces
kind = "gpt_neox"
hidden_size =   32

    num_attention_heads = 4

[recurrence]
kind = "latent_thoughts"
jacobi = { train = [2,
  4
], eval = 3 }                        # the inline table starts at line 13
thoughts = 2
[optimizer]
kind = "adamw"
betas = [    # line 19
    0.8,

    0.9,     # ] not the end
]
lr = 0.5
[evaluators.a]
kind = "sample"
prompt = '''
[run]
steps = 99
'''
every = 7
[evaluators.'b.c']
kind = "perplexity"
"""


def leaves(table, above=()):
    """The path and value of every option."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value
