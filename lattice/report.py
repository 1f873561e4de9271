"""What the commands print when they are done."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lattice import registry
from lattice.atomic import append_line
from lattice.console import errors, plural, say, table
from lattice.generate import Sampling, stream
from lattice.model import LanguageModel
from lattice.options import to_table
from lattice.protocols import Codec, kind_of
from lattice.recipe import Recipe, load_recipe
from lattice.run_folder import read_table
from lattice.text_generation import Completion, Continuation, check_stop, prompt_ids
from lattice.toml_source import Path_


def show_summary(summary: dict[str, Any], folder: Path) -> None:
    """The end of a run: figures, texts, where it lies and what to try next."""
    rows = [
        [name.replace("_mib", ", MiB").replace("_", " "), _number(value)]
        for name, value in summary.items()
        if isinstance(value, int | float)
    ]
    table(f"{folder}", ["", "value"], rows)
    for name, text in summary.items():
        if isinstance(text, str):
            say(f"\n{name.replace('_', ' ')}:\n{text}")
    quoted = shlex.quote(str(folder))
    trust = " --trust-imports" if read_table(folder).get("imports") else ""
    say(
        f"\nThe run is in '{folder}': metrics.jsonl, tensorboard/, checkpoints/, summary.json. Next:\n"
        f'  lattice generate {quoted} --prompt "def "{trust}\n'
        f"  tensorboard --logdir {quoted}/tensorboard\n"
        "  lattice components recurrence"
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def show_recipe(recipe: Recipe, *, origin: bool) -> None:
    """The resolved recipe as TOML, with `origin` the source of each value behind it."""
    if not origin:
        say(recipe.to_toml())
        return
    lines = [(f"{'.'.join(path)} = {value}", path) for path, value in _leaves(recipe.table())]
    width = max(len(line) for line, _ in lines)
    for line, path in lines:
        say(f"{line:<{width}}  # {recipe.origin(path)}")


def _leaves(table_: dict[str, Any], above: Path_ = ()) -> list[tuple[Path_, str]]:
    found: list[tuple[Path_, str]] = []
    for key, value in table_.items():
        path = (*above, key)
        found += _leaves(value, path) if isinstance(value, dict) else [(path, json.dumps(value))]
    return found


def show_checks(target: str, overrides: Sequence[str]) -> bool:
    """Runs the conformance kit on what a file registers, or a kind; shows the results; True if all hold."""
    from lattice.testing.kit import CHECKS, ROLES, run_checks

    held = True
    for role, checked in _components(target, overrides):
        with Progress(console=errors, disable=not errors.is_terminal, transient=True) as bar:
            task = bar.add_task(checked["kind"], total=len(CHECKS) * len(ROLES[role][0]))
            results = []
            for result in run_checks(role, checked):
                results.append(result)
                bar.advance(task)
        failed = [result for result in results if not result.held]
        claims = {result.check: result.claim for result in results}
        rows = []
        for name, claim in claims.items():
            of = [result for result in failed if result.check == name]
            shown = "\n".join(f"{result.beside}: {result.counterexample}" for result in of)
            rows.append([name, claim, shown or "holds"])
        besides = ", ".join(dict.fromkeys(result.beside for result in results))
        table(f"{role} '{checked['kind']}' with {besides}", ["check", "what it asserts", "result"], rows)
        broken = sorted({result.check for result in failed})
        say(
            f"{len(broken)} of {len(claims)} checks fail: {', '.join(broken)}"
            if broken
            else "all checks hold"
        )
        held = held and not failed
    return held


def _components(target: str, overrides: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """What to check: roles and tables of a recipe."""
    from lattice.testing.kit import ROLES
    from lattice.testing.subject import small

    if target.endswith(".py"):
        registry.import_user_code(target, Path.cwd())
        module = registry.module_of((Path.cwd() / target).resolve())
        found = [(role, kind) for role in ROLES for kind in registry.defined_in(module, role)]
        if not found:
            raise ValueError(
                f"{target} registers nothing that is checked ({', '.join(ROLES)}): put "
                f'@register("recurrence", NAME) above a class'
            )
    elif target.isidentifier():
        found = [(role, target) for role in ROLES if target in registry.kinds(role)]
        if not found:
            known = sorted(kind for role in ROLES for kind in registry.kinds(role))
            raise ValueError(
                f"'{target}' is no kind of {' or '.join(ROLES)}{registry.nearest(target, known)} "
                f"Known: {', '.join(known)}"
            )
    else:
        raise ValueError(
            f"'{target}': must be a .py file that registers components, or a kind of {' or '.join(ROLES)}"
        )
    tables = []
    for role, kind in found:
        given = {"kind": kind}
        # An option may be called as it is in a recipe; of several roles, which one has it must be said.
        others = tuple(f"{other}." for other, _ in found if other != role)
        here = [one.removeprefix(f"{role}.") for one in overrides if not one.startswith(others)]
        alike = [other for at, other in found if at == role]
        options = [
            f"{role}.{option}"
            for option in here
            if _has(role, kind, option) or not any(_has(role, other, option) for other in alike)
        ]
        recipe = load_recipe({role: small(given) if role == "backbone" else given}, options)
        tables.append((role, to_table(recipe.component(role))))
    return tables


def _has(role: str, kind: str, option: str) -> bool:
    """Whether that kind has the option of an override, be the value right or not."""
    name = re.split(r"[.=]", option, maxsplit=1)[0]
    return name in {field.name for field in fields(registry.lookup(role, kind))}


def show_prefill(model: LanguageModel, what: str, *, parallel: bool) -> None:
    """Says on stderr how prompts are evaluated."""
    recurrence = model.recurrence
    kind = kind_of(recurrence)
    if recurrence.parallel_is_exact:
        how = "all tokens at once, which is exact"
    elif parallel:
        how = "all tokens at once by the solver, at its evaluation settings"
    else:
        how = "token by token, in sequence"
    slots = f", {recurrence.slots} slots a token" if recurrence.slots > 1 else ""
    errors.print(f"{what}: {how} ({kind}{slots})", markup=False, soft_wrap=True)


def stream_text(
    model: LanguageModel,
    codec: Codec,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    parallel_prefill: bool = False,
) -> None:
    """Writes the prompt and its continuation to stdout as it is decoded, up to the end of the document or a
    stop string."""
    check_stop(stop)
    ids = prompt_ids(model, codec, [(0, prompt)], max_new_tokens)[0]
    device = next(model.parameters()).device
    sampling = replace(sampling, vocab_size=codec.vocab_size)
    ids_BL = torch.tensor([ids], device=device)
    following = stream(model, ids_BL, max_new_tokens, sampling=sampling, parallel_prefill=parallel_prefill)
    show_prefill(model, f"prompt of {plural(len(ids), 'token')}", parallel=parallel_prefill)
    row = Continuation(codec, ids, stop)
    sys.stdout.write(prompt)
    for next_id in following:
        sys.stdout.write(row.add(int(next_id)))
        sys.stdout.flush()
        if row.finish:
            break
    sys.stdout.write(row.rest() + "\n")


def write_completions(
    model: LanguageModel,
    done: Iterable[tuple[int, Completion]],
    prompts: Sequence[str],
    left: Sequence[tuple[int, str]],
    out: Path | None,
    settings: dict[str, Any],
    *,
    parallel: bool,
) -> None:
    """As jsonl with the settings they came from, each line on disk as soon as its batch is done, with a
    progress bar; or to stdout."""
    finished = len(prompts) - len(left)
    show_prefill(model, f"{plural(len(left), 'prompt')}, {finished} done before", parallel=parallel)
    with Progress(console=errors, disable=out is None or not errors.is_terminal) as bar:
        task = bar.add_task("prompts", total=len(prompts), completed=finished)
        for number, completion in done:
            row = {"number": number, **asdict(completion), "settings": settings}
            line = json.dumps(row, ensure_ascii=False)
            if out is None:
                print(line, flush=True)
            else:
                append_line(out, line)
            bar.advance(task)
