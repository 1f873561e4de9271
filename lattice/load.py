"""A trained model back from its run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lattice import user_code
from lattice.assemble import evaluation_graph
from lattice.build import build_model
from lattice.codec import saved_codec
from lattice.hardware import choose_device
from lattice.model import LanguageModel
from lattice.protocols import Checkpoint, Checkpointer, Codec, EvaluationSubject
from lattice.recipe import Recipe, load_recipe
from lattice.run_folder import CHECKPOINTS, RECIPE, read_table
from lattice.state import weights
from lattice.thought_counts import counted


def load(
    path: str | Path,
    *,
    overrides: Iterable[str] = (),
    device: str = "cpu",
    trust_imports: bool = False,
) -> LanguageModel:
    """The model of a run directory (its latest checkpoint) or of one checkpoint in it, ready to evaluate.

    `overrides` change the run's recipe, e.g. `recurrence.thoughts=2`; the weights must still fit. Nothing in
    the directory is executed; a recipe that imports a user's file is refused unless `trust_imports`. Raises
    FileNotFoundError where there is no run or no checkpoint, ValueError where a checkpoint is damaged or of
    another model.
    """
    recipe = recipe_of(path, overrides=overrides, trust_imports=trust_imports)
    model, _ = _load(Path(path), recipe)
    return model.to(choose_device(device, "device")).eval()


def load_subject(
    path: str | Path,
    *,
    thoughts: int | None = None,
    iterations: int | None = None,
    overrides: Iterable[str] = (),
    device: str = "auto",
    trust_imports: bool = False,
) -> EvaluationSubject:
    """A run, or one of its checkpoints, ready for evaluators: its model with `thoughts` and `iterations` in
    place of the recipe's if given, its tokenizer, its data, and the precision it was trained in. The data is
    opened when it is first asked for. Raises as `load`, and ValueError for a count that cannot be had."""
    recipe = recipe_of(path, overrides=overrides, trust_imports=trust_imports)
    return subject_of(path, counted(recipe, thoughts, iterations), device=device)


def subject_of(path: str | Path, recipe: Recipe, *, device: str = "auto") -> EvaluationSubject:
    """As `load_subject`, with a recipe in place of the run's own: its model must have the same weights."""
    folder, _ = locate(Path(path))
    model, facts = _load(Path(path), recipe)
    codec = saved_codec(recipe, folder, facts)
    return evaluation_graph(recipe, codec, model, int(facts["step"]), device=device)


def _load(path: Path, recipe: Recipe) -> tuple[LanguageModel, dict[str, Any]]:
    """The model that `recipe` describes with the weights of a run or checkpoint, and its facts."""
    model = build_model(recipe)
    return model, _read(path, recipe, {"model": weights(model)})


def _read(path: Path, recipe: Recipe, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fills `tensors` from a run or checkpoint and returns its facts."""
    while True:
        checkpointer, checkpoint = saved(path, recipe)
        try:
            facts = checkpointer.load(checkpoint, tensors)
        except Exception as error:
            if checkpoint.is_dir():
                raise
            # A run that goes on removes its oldest checkpoints: the latest may be another one by now.
            if path.resolve() == checkpoint.resolve():
                raise FileNotFoundError(f"'{checkpoint}' was removed while it was read") from error
        else:
            return facts


def checkpoint_of(path: str | Path, *, trust_imports: bool = False) -> Path:
    """The latest checkpoint of a run, or the checkpoint itself. Raises FileNotFoundError where there is
    none."""
    return saved(Path(path), recipe_of(path, trust_imports=trust_imports))[1]


def saved(path: Path, recipe: Recipe) -> tuple[Checkpointer, Path]:
    """What reads the checkpoints of a run, and the one that `path` means."""
    folder, checkpoint = locate(path)
    component: Checkpoint = recipe.component("checkpoint")
    checkpointer = component.build(folder / CHECKPOINTS)
    checkpoint = checkpoint or checkpointer.latest()
    if checkpoint is None:
        raise FileNotFoundError(f"'{folder}' has no checkpoint yet")
    return checkpointer, checkpoint


def recipe_of(path: str | Path, *, overrides: Iterable[str] = (), trust_imports: bool = False) -> Recipe:
    """The recipe that a run, or the run of a checkpoint, followed, with `overrides` over it."""
    folder, _ = locate(Path(path))
    table = read_table(folder)
    if "imports" in table:
        table["imports"] = user_code.found(folder, table["imports"])
    return load_recipe(table, overrides, allow_imports=trust_imports)


def codec_of(path: str | Path, *, trust_imports: bool = False) -> Codec:
    """The tokenizer that a run, or one of its checkpoints, was trained with. Raises ValueError where another
    one lies in its place, FileNotFoundError where there is none, or no checkpoint."""
    folder, _ = locate(Path(path))
    recipe = recipe_of(folder, trust_imports=trust_imports)
    return saved_codec(recipe, folder, _read(Path(path), recipe, {}))


def locate(path: Path) -> tuple[Path, Path | None]:
    """The run's directory, and the checkpoint if `path` is one."""
    for given in (path, path.resolve()):  # what a link or `.` means has other folders above it
        if (given / RECIPE).is_file():
            return given, None
        if (given.parent.parent / RECIPE).is_file() and given.is_dir():
            return given.parent.parent, given
    raise FileNotFoundError(
        f"'{path}' is no run and no checkpoint of one: give the directory that `lattice run` wrote, "
        f"which holds {RECIPE}"
    )
