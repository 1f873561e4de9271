"""The command line. Each command is a few lines over the Python API."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.markup import escape

from lattice import __version__, registry
from lattice.protocols import ROLES

app = App(
    name="lattice",
    version=__version__,
    help="Pretraining of language models that think before every token.",
    help_on_error=False,
)
Set = Annotated[
    list[str] | None,
    Parameter(name="--set", consume_multiple=True, negative="", help="Overrides, table.key=value."),
]


@app.command
def run(recipe: Path, *, set_: Set = None, out: Path | None = None) -> None:
    """Train as a recipe says; the same command goes on with a run that was interrupted.

    Parameters
    ----------
    recipe
        A TOML file.
    out
        The run's directory; runs/ and the recipe's name if not given.
    """
    from lattice.report import show_summary
    from lattice.train import train

    folder = out or Path("runs") / recipe.stem
    summary = train(recipe, overrides=set_ or [], out=folder)
    if "stopped_at" not in summary:
        show_summary(summary, folder)


@app.command
def show(recipe: Path, *, set_: Set = None, origin: bool = False) -> None:
    """Print the resolved recipe.

    Parameters
    ----------
    origin
        Say behind each value where it comes from.
    """
    from lattice.recipe import load_recipe
    from lattice.report import show_recipe

    show_recipe(load_recipe(recipe, set_ or []), origin=origin)


@app.command
def components(role: str | None = None) -> None:
    """List the kinds of a role, or of all roles, with their options.

    Parameters
    ----------
    role
        For instance recurrence.
    """
    from lattice.console import table

    if role is not None and role not in ROLES:
        raise registry.UnknownName(
            f"role '{role}' does not exist{registry.nearest(role, ROLES)} Roles: {', '.join(ROLES)}"
        )
    for name in [role] if role else ROLES:
        rows = [
            [kind, (cls.__doc__ or "").strip().splitlines()[0], _options(cls)]
            for kind, cls in registry.kinds(name).items()
        ]
        table(name, ["kind", "what it is", "options"], rows)


def _options(cls: Any, above: str = "") -> str:
    """Each option with its default, as it would stand in a recipe; nested ones by their dotted names."""
    lines = []
    for option in fields(cls):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if is_dataclass(default):
            lines.append(_options(type(default), f"{above}{option.name}."))
            continue
        shown = "required" if default is MISSING else "not set" if default is None else json.dumps(default)
        lines.append(f"{above}{option.name} = {shown}")
    return "\n".join(lines)


@app.command
def generate(
    run: Path,
    *,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    device: str = "cpu",
    trust_imports: bool = False,
) -> None:
    """Continue a prompt, token by token, the thoughts computed in sequence through the key/value cache.

    Parameters
    ----------
    run
        A run's directory, or one of its checkpoints.
    temperature
        0 takes the likeliest token each time.
    trust_imports
        Import the user code that the run's recipe names.
    """
    from lattice.generate import Sampling
    from lattice.load import codec_of, load
    from lattice.report import stream_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    codec = codec_of(run, trust_imports=trust_imports)
    model = load(run, device=device, trust_imports=trust_imports)
    stream_text(model, codec, prompt, max_new_tokens, sampling)


@app.command
def export(run: Path, *, out: Path, trust_imports: bool = False) -> None:
    """Write a run's model as a Hugging Face directory: config.json, safetensors and the tokenizer.

    Parameters
    ----------
    run
        A run's directory, or one of its checkpoints.
    """
    from lattice.console import say
    from lattice.load import load, recipe_of
    from lattice.pretrained import save_pretrained

    save_pretrained(load(run, trust_imports=trust_imports), out)
    recipe_of(run, trust_imports=trust_imports).component("tokenizer").build(out)
    say(f"wrote {out}")


@app.command
def prepare(
    *sources: str,
    out: Path,
    tokenizer: str | None = None,
    train_bpe: int | None = None,
    validation_fraction: float = 0.0,
    text_key: str = "text",
) -> None:
    """Turn text into token shards. The same command goes on with a preparation that was interrupted.

    Parameters
    ----------
    sources
        Text, jsonl (also .gz, .xz, .zst), parquet, directories of these, or a Hugging Face dataset name.
    out
        Directory of the shards.
    tokenizer
        bytes, a tokenizer.json, a sentencepiece .model, or a name on the Hugging Face hub.
    train_bpe
        Train a byte-level BPE of this many tokens on the sources instead.
    validation_fraction
        Share of the documents to hold out.
    text_key
        Key or column of the text in jsonl and parquet.
    """
    from lattice.prepare import prepare as prepare_

    prepare_(
        list(sources),
        out,
        tokenizer,
        train_bpe=train_bpe,
        validation_fraction=validation_fraction,
        text_key=text_key,
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point: an error of the user's making is printed without a traceback, and the exit code is 2."""
    from lattice.console import errors

    try:
        app(arguments, exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError, OSError, ImportError) as error:
        for line in str(error).splitlines():
            errors.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
