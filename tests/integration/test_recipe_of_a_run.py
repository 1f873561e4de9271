"""The same directory with another recipe: what may differ, what is refused, more steps and fewer."""

import json
import shutil
from contextlib import nullcontext

import pytest

import lattice
from lattice import run_folder
from tests.integration.training_runs import rows, steps, stop_at


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused_and_the_difference_named(finished, train, tmp_path):
    train(*([] if finished else stop_at(2)))
    before = rows(tmp_path / "run")
    with pytest.raises(run_folder.RunExists) as caught:
        train("optimizer.lr=0.5", "recurrence.jacobi.eval=1", "recurrence.embed_scale=2.0")
    message = str(caught.value)
    assert "optimizer.lr: 0.01 there, 0.5 here" in message
    assert "recurrence.jacobi.eval: 2 there, 1 here" in message
    assert "recurrence.embed_scale: 'unset' there, 2.0 here" in message
    assert "--out" in message
    assert rows(tmp_path / "run") == before


def test_what_may_differ_does_not_make_another_run(train, whole, tmp_path):
    train(*stop_at(5))
    train(
        "run.log_every=5", "checkpoint.every=3", "evaluators.more.kind=perplexity", "evaluators.more.every=0"
    )
    found = [row for row in rows(tmp_path / "run") if not any(key.startswith("more/") for key in row)]
    assert found == whole()


def test_how_the_data_is_read_may_differ(train, whole, short_documents, tmp_path):
    train(*short_documents, *stop_at(3))
    train(*short_documents, "data.workers=1", "data.verify=false")
    assert rows(tmp_path / "run") == whole(*short_documents)


@pytest.mark.parametrize(("key", "free"), [("data.verify", True), ("data.verifies", False)])
def test_what_may_differ_is_named_in_full(key, free, tmp_path):
    """A component of a user's may have an option whose name only begins like one that is free."""
    recipe = lattice.load_recipe({})
    run_folder.open_run(tmp_path, recipe)
    path = tmp_path / run_folder.RECIPE
    path.write_text(path.read_text().replace("[data]\n", f"[data]\n{key.removeprefix('data.')} = 1\n"))
    with nullcontext() if free else pytest.raises(run_folder.RunExists, match=rf"{key}: 1 there"):
        run_folder.check_same(tmp_path, recipe)


@pytest.mark.parametrize(
    "override", ["run.micro_batch=1", "activation_checkpoint.kind=pass", "activation_checkpoint.kind=block"]
)
def test_a_run_may_go_on_on_a_machine_with_less_memory(train, whole, tmp_path, override):
    train(*stop_at(5))
    train(override)
    found = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert found == pytest.approx([row["loss"] for row in whole() if "loss" in row], abs=1e-6)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": "many"}'])
def test_a_summary_that_is_none_is_named(train, tmp_path, text):
    train("run.steps=3")
    (tmp_path / "run" / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json: no summary of a run"):
        train("run.steps=3")


def test_more_steps_of_a_run_that_had_ended_are_not_taken_in_silence(train, capsys):
    train("run.steps=3")
    train("run.steps=5")
    assert "after step 3, where it had ended: with 5 steps in place of 3 its lear" in capsys.readouterr().out
    train("run.steps=8", *stop_at(6))
    train("run.steps=9")
    assert "after step 6: with 9 steps in place of 8 its learning rate follows" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["metrics.jsonl", "summary.json", "checkpoints"])
def test_what_is_left_of_a_run_is_not_written_over(left, train, tmp_path):
    train("run.steps=2")
    (tmp_path / "run" / "recipe.toml").unlink()
    for name in {"metrics.jsonl", "summary.json", "checkpoints"} - {left}:
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(run_folder.RunExists, match=rf"holds {left} but no recipe\.toml"):
        train("run.steps=2")


def test_a_tokenizer_without_room_is_not_kept(train, tmp_path):
    """The recipe that was put right would be told to use it."""
    trained = ("tokenizer.kind=bpe", "run.steps=1")
    with pytest.raises(
        lattice.recipe.RecipeError, match=r"backbone\.vocab_size = 257: the tokenizer has 300"
    ):
        train(*trained, "tokenizer.vocab_size=300")
    assert train(*trained, "tokenizer.vocab_size=257")["steps"] == 1


def test_more_steps_go_on_from_the_end(train, tmp_path):
    first = train("schedule.kind=wsd")
    twelve = rows(tmp_path / "run")
    longer = train("schedule.kind=wsd", "run.steps=15")
    assert (first["steps"], longer["steps"]) == (12, 15)
    assert longer["tokens"] == 15 * 128
    assert rows(tmp_path / "run")[: len(twelve)] == twelve
    assert steps(tmp_path / "run") == list(range(1, 16))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == longer


def test_a_run_may_be_ended_where_it_was_stopped(train, tmp_path):
    train(*stop_at(5))
    summary = train("run.steps=5")
    assert summary["steps"] == 5
    assert "validation_loss" in summary
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" not in row] == [3, 5]


def test_fewer_steps_than_were_taken_are_no_result(train, tmp_path):
    """A summary of 3 steps after 5 were taken would be of another model."""
    train(*stop_at(5))
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    with pytest.raises(ValueError, match=r"run\.steps = 3.*5"):
        train("run.steps=3")
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before
    assert not (tmp_path / "run" / "summary.json").exists()
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
