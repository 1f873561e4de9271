"""The model card of an exported run. Every figure in it is read from the run's own files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCard, ModelCardData

from lattice.recipe import Recipe
from lattice.run_folder import METRICS, RECIPE, SUMMARY, read_metrics

LIBRARY = "lattice"
"""The tag by which the card of an export is known."""
TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM{also}

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{code})
{tokenizer}```
"""
TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory"{code})\n'
NO_TOKENIZER = """
The tokenizer's files are here as the run kept them; `AutoTokenizer` does not read them.
"""
THINKING = """
`trust_remote_code` runs the Python files of this directory, which need the package `lattice` that wrote it.
`generate` computes the thoughts in sequence through a cache; a plain forward computes all tokens in
parallel, at the evaluation settings of the recurrence. For other settings change `recurrence` of the loaded
configuration and pass that as `config`.
"""
LATTICE = """
With `lattice` alone:

```python
import lattice

model = lattice.from_pretrained("path/to/this/directory"{trust})
```"""


def write_card(
    run: Path,
    folder: Path,
    recipe: Recipe,
    facts: dict[str, Any],
    *,
    plain: bool,
    tokenizer: bool,
    trust: bool,
) -> None:
    """Writes README.md. `facts` are the checkpoint's, `tokenizer` says whether AutoTokenizer reads the files,
    and `trust` whether the user's own code goes along."""
    recurrence, backbone = recipe.component("recurrence"), recipe.component("backbone")
    table = recipe.table()
    if recipe.imports:
        table["imports"] = [Path(name).name if name.endswith(".py") else name for name in recipe.imports]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[LIBRARY, backbone.kind, *([] if plain else [recurrence.kind, "custom_code"])],
    )
    sections = [
        f"# {run.resolve().name}",
        f"A language model trained with lattice: backbone `{backbone.kind}`, recurrence `{recurrence.kind}` "
        f"({_first_line(recurrence)})",
        "## Loading\n\n" + _loading(plain=plain, tokenizer=tokenizer, trust=trust),
        "## Training\n\n" + _table(_figures(run, facts)),
        "## Data\n\n" + _toml({name: table[name] for name in ("data", "tokenizer")}),
        "## Recipe\n\nResolved, with every option.\n\n" + _toml(table),
        "## Versions\n\n" + _versions(run),
    ]
    content = "\n\n".join(sections)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}\n").save(folder / "README.md")


def _first_line(component: Any) -> str:
    return (type(component).__doc__ or "").strip().splitlines()[0].rstrip(".")


def _loading(*, plain: bool, tokenizer: bool, trust: bool) -> str:
    code = "" if plain else ", trust_remote_code=True"
    text = TRANSFORMERS + ("" if tokenizer else NO_TOKENIZER) + ("" if plain else THINKING) + LATTICE
    return (
        text.replace("{tokenizer}", TOKENIZER if tokenizer else "")
        .replace("{also}", ", AutoTokenizer" if tokenizer else "")
        .replace("{code}", code)
        .replace("{trust}", ", trust_imports=True" if trust else "")
    )


def _figures(run: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Of this checkpoint, and of the whole run where it is the last one."""
    step = facts["step"]
    figures: dict[str, Any] = {"steps": step, "tokens seen": facts["tokens"]}
    for row in read_metrics(run / METRICS):
        if row["step"] > step:
            continue
        if row["step"] == step and "loss" in row:
            figures["training loss (nats a token)"] = row["loss"]
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                figures[name.replace("/", " ").replace("_", " ")] = value  # the last one so far stays
    summary_file = run / SUMMARY
    if summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        if summary.get("steps") == step:
            names = ("parameters", "seconds", "tokens_per_second", "peak_memory_mib")
            figures |= {name.replace("_", " "): summary[name] for name in names if name in summary}
    return figures


def _table(figures: dict[str, Any]) -> str:
    lines = [f"| {name} | {_number(value)} |" for name, value in figures.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def _toml(table: dict[str, Any]) -> str:
    return f"```toml\n{tomli_w.dumps(table)}```"


def _versions(run: Path) -> str:
    """The comments with which a run's recipe begins."""
    lines = (run / RECIPE).read_text(encoding="utf-8").splitlines()
    header = itertools.takewhile(lambda line: line.startswith("#"), lines)
    comments = [line.removeprefix("#").strip() for line in header]
    return "\n".join(f"* {line}" for line in comments) or "not recorded"
