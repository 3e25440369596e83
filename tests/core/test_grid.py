"""The grid: refusals before any training, one folder per recipe, cells that resume."""

# ruff: noqa: E501 - one mistake a line

import json

import pytest
from list_stream import exact_rows
from recipe_files import GOOD

from remanence.errors import DataError, RecipeError, RemanenceError, SettingError, StateMismatchError
from remanence.grid import cells_of, check, prepare, run_cells
from remanence.ledger import Ledger
from remanence.recipe import read_recipe


@pytest.fixture
def recipe_of(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path / "cache"))

    def recipe_of(*changes, **overrides):
        text = GOOD
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "r.yaml").write_text(text)
        return read_recipe(tmp_path / "r.yaml", {key.replace("__", "."): value for key, value in overrides.items()})

    return recipe_of


REFUSED = {
    "task ids": ((("means: {call: remanence.weights.Prototypes,", "means: {call: remanence.weights.LoRA, router: oracle,"),),
                 SettingError, r"LoRA needs to be told the task's name, stream .* withholds it"),
    "a learning rate": ((("lr: 1e-3", "lr: -1"),), SettingError, r"lr=-1.0 must be above 0"),
    "an image size": ((("source: $old, width", "source: {call: recipe_files.large}, width"),), DataError, r"\(1, 8, 8\).*\(1, 12, 12\)"),
    "seen test data": ((("{call: recipe_files.shapes}", "{call: recipe_files.swapped}"),), DataError,
                       r"test examples of .* are in the training data of artifact 'backbone'"),
    "no artifact": ((("remanence.parts.PretrainedViT, source: $old, width: 16, depth: 1, heads: 2, patch: 4, epochs: 1, batch_size: 8",
                      "recipe_files.no_artifact, source: $old"),), RecipeError, r"line 6: artifacts.backbone: gives a Source, not an Artifact"),
    "no stream": ((("remanence.streams.split_classes, source: $new, per_task: 2", "recipe_files.shapes"),), RecipeError, r"gives a Source, not a Stream"),
    "no learner": ((("remanence.weights.Prototypes, backbone: $backbone", "recipe_files.shapes"),), RecipeError, r"gives a Source, not a Learner"),
    "a probe twice": ((("at: log}", "at: log}\n  - {call: remanence.probes.Accuracy}"),), RecipeError, r"a probe stands twice"),
    "a patch": ((("patch: 4", "patch: 3"),), SettingError, r"patch=3 must divide the image side 8"),
    "folders": ((("  means:", "  tuned!: {call: remanence.weights.Prototypes, backbone: $backbone}\n  means:"),), RecipeError,
                r"two cells share the folder 'in-turn--tuned--0'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_any_training(recipe_of, monkeypatch, changes, error, message):
    def trained(*args):
        raise AssertionError("something was trained")

    monkeypatch.setattr("remanence.parts.pretraining.PretrainedViT.build", trained)
    monkeypatch.setattr("remanence.parts.gradient.GradientLearner._descend", trained)
    with pytest.raises(RemanenceError, match=message) as raised:
        check(recipe_of(*changes))
    assert isinstance(raised.value, ValueError)
    assert error


def test_a_good_recipe_passes_and_leaves_nothing_behind(recipe_of, tmp_path):
    check(recipe_of())
    assert not (tmp_path / "cache").exists()


def test_a_run_goes_through_and_is_repeated_for_free(recipe_of, tmp_path, monkeypatch):
    recipe, run, told = recipe_of(), tmp_path / "run", []
    folders = prepare(recipe, run, "the command", lambda name, progress: told.append(name))
    assert set(told) == {"backbone"}
    run_cells(recipe, folders, run, 1, lambda cell, done, total: told.append((cell.folder, done, total)))
    names = [cell.folder for cell in cells_of(recipe)]
    assert names == ["in-turn--tuned--0", "in-turn--tuned--1", "in-turn--means--0", "in-turn--means--1"]
    assert [entry for entry in told if isinstance(entry, tuple)] == [(name, done, 2) for name in names for done in (1, 2)]
    manifest = json.loads((run / "run.json").read_text())
    assert (manifest["run"], manifest["command"], manifest["cells"]) == (recipe.run, "the command", names)
    before = [exact_rows(Ledger(run / "cells" / name / "ledger.jsonl")) for name in names]
    assert all(before)
    frame = Ledger.open(run)
    assert frame["learner"].drop_duplicates().tolist() == ["tuned", "means"]
    told.clear()
    monkeypatch.setattr("remanence.runner.CellRunner.run", None)
    run_cells(recipe, prepare(recipe, run, on_artifact=lambda name, progress: told.append(name)), run, 1)
    assert told == []
    assert [exact_rows(Ledger(run / "cells" / name / "ledger.jsonl")) for name in names] == before


def test_a_run_folder_of_another_recipe_is_refused(recipe_of, tmp_path):
    prepare(recipe_of(), tmp_path / "run")
    with pytest.raises(StateMismatchError, match=r"run was begun with another recipe .*Give another --out, or delete the folder"):
        prepare(recipe_of(seeds="[7]"), tmp_path / "run")
    with pytest.raises(StateMismatchError, match="was begun with another"):
        prepare(recipe_of(("depth: 1", "depth: 2")), tmp_path / "run")


def test_a_cell_of_one_learner_alone(recipe_of):
    recipe = recipe_of(("{stream: in turn}", "{stream: in turn, learners: [means]}"))
    assert [(cell.learner, cell.seed) for cell in cells_of(recipe)] == [("means", 0), ("means", 1)]


def test_a_device_that_is_not_there(recipe_of):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RemanenceError, match=r"device: 'cuda' is not available, accelerate finds 'cpu'"):
        check(recipe_of(device="cuda"))
