"""`remanence meta-train` from recipe to folder: checks first, resumes, copies whole or not at all, exit codes like the others."""

import json
import subprocess
import sys

import pytest
import yaml

from remanence.cli import main
from remanence.errors import NonFiniteLoss
from remanence.generated import load_hypertransformer, meta_training
from remanence.generated.meta_training import MetaTrainedHyperTransformer
from remanence.recipes import recipe_path, shipped

TINY = """
name: tiny
about: Digits, and their turned copies.
sources:
  digits: {call: remanence.streams.digits}
  turned: {call: remanence.streams.turned, source: $digits}
artifacts:
  writer:
    call: remanence.generated.MetaTrainedHyperTransformer
    source: $turned
    channels: 2
    n_layers: 3
    width: 8
    depth: 1
    max_ways: 3
    ways: [2, 3]
    shots: 1
    queries: 2
    tasks: 2
    steps: 6
    every: 2
"""


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(meta_training, "_VALIDATION_TASKS", 4)
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return tmp_path / "tiny.yaml"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


# --- what it does --------------------------------------------------------------------------------------------------


def test_it_trains_and_says_what_came_out(recipe, cache, capsys):
    assert call("meta-train", recipe) == 0
    printed = capsys.readouterr().out.splitlines()
    folder = made(cache)
    report = json.loads((folder / "training.json").read_text())
    assert printed[0] == "tiny: 6 steps on 26 classes of 'digits turned', 4 held out"
    assert printed[1] == "meta-training writer: 6/6"
    assert printed[2] == f"accuracy on 4 held-out classes: {report['valid_accuracy']:.3f} (step {report['best_step']})"
    assert printed[3] == f"size: {(folder / 'model.safetensors').stat().st_size:,} bytes, {report['n_parameters']:,} parameters"
    assert printed[4].endswith(f"it lies in {folder}")
    load_hypertransformer(folder)


def test_a_second_call_finds_what_is_finished(recipe, cache, capsys, monkeypatch):
    assert call("meta-train", recipe) == 0
    before = files(made(cache))
    monkeypatch.setattr(MetaTrainedHyperTransformer, "loss", lambda *arguments: pytest.fail("trained again"))
    assert call("meta-train", recipe) == 0
    assert files(made(cache)) == before
    assert "held-out classes" in capsys.readouterr().out


def test_an_interrupted_training_goes_on_and_ends_alike(recipe, cache, tmp_path, monkeypatch, capsys):
    assert call("meta-train", recipe, "--out", tmp_path / "whole") == 0
    (made(cache)).rename(tmp_path / "elsewhere")
    loss = MetaTrainedHyperTransformer.loss

    def interrupted(self, model, step):
        if step == 3:
            raise KeyboardInterrupt
        return loss(self, model, step)

    monkeypatch.setattr(MetaTrainedHyperTransformer, "loss", interrupted)
    assert call("meta-train", recipe, "--out", tmp_path / "cut") == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()
    steps = []
    monkeypatch.setattr(MetaTrainedHyperTransformer, "loss", lambda *arguments: (steps.append(arguments[2]), loss(*arguments))[1])
    assert call("meta-train", recipe, "--out", tmp_path / "cut") == 0
    assert steps == [2, 3, 4, 5]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_copy_carries_the_recipes_words_and_the_cache_does_not(recipe, cache, tmp_path):
    assert call("meta-train", recipe, "--out", tmp_path / "out") == 0
    about = json.loads((tmp_path / "out" / "hypertransformer.json").read_text())["about"]
    assert about["recipe"] == "tiny"
    assert about["about"] == "Digits, and their turned copies."
    assert about["trained_on"] == "digits turned"
    copied, cached = files(tmp_path / "out"), files(made(cache))
    assert copied.pop("hypertransformer.json") != cached.pop("hypertransformer.json")
    assert copied == cached
    load_hypertransformer(tmp_path / "out")


def test_overrides_change_what_is_made(recipe, cache):
    assert call("meta-train", recipe, "--set", "artifacts.writer.steps=2", "--set", "artifacts.writer.ways=3") == 0
    assert json.loads((made(cache) / "training.json").read_text())["steps"] == 2


def test_an_early_stop_is_said(recipe, capsys, monkeypatch):
    monkeypatch.setattr(MetaTrainedHyperTransformer, "_validate", lambda *arguments: 0.5)
    assert call("meta-train", recipe, "--set", "artifacts.writer.patience=1") == 0
    assert "0.500 (step 2, stopped early after 4)" in capsys.readouterr().out


def test_the_continual_form(recipe, cache):
    text = TINY.replace("HyperTransformer\n", "ContinualHyperTransformer\n").replace("tasks: 2", "n_tasks: 2\n    sequences: 2")
    recipe.write_text(text.replace("ways: [2, 3]", "ways: 3"), encoding="utf-8")
    assert call("meta-train", recipe) == 0
    assert json.loads((made(cache) / "hypertransformer.json").read_text())["class"] == "ContinualHyperTransformer"


# --- what it refuses -----------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert call(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_with_content_is_refused_before_training(recipe, cache, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    assert "exists already; nothing is ever overwritten" in refused(capsys, "meta-train", recipe, "--out", tmp_path / "out")
    assert not cache.exists()


def test_a_copy_that_breaks_off_leaves_no_folder(recipe, tmp_path, monkeypatch):
    from remanence import state

    write_whole = state.write_whole

    def full(path, content):
        if ".out." in str(path):
            raise OSError("disk full")
        write_whole(path, content)

    monkeypatch.setattr(state, "write_whole", full)
    with pytest.raises(OSError, match="disk full"):
        main(["meta-train", str(recipe), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    width: 8", "    widht: 8", "has no setting 'widht'. Did you mean 'width'"),
        ("    width: 8", "    width: wide", "artifacts.writer.width: must be int, got 'wide'"),
        ("    width: 8", "    width: 9", "width=9"),
        ("ways: [2, 3]", "ways: 4", "ways=4 asks for up to 4 classes, max_ways=3"),
        ("ways: [2, 3]", "ways: [2, 3, 4]", "artifacts.writer.ways: must be"),
        ("steps: 6", "steps: 0", "steps=0 must be 1 or more"),
        ("$turned", "$turnt", "nothing is named 'turnt'. Did you mean 'turned'"),
        ("MetaTrainedHyper", "MetaTrainedHiper", "has no 'MetaTrainedHiperTransformer'. Did you mean 'MetaTrainedHyperTransformer'"),
        ("sources:", "seeds: [0]\nsources:", "seeds: a recipe that trains has no 'seeds'; it has sources and one artifact"),
        ("sources:", "streams: {all: {call: remanence.streams.joint}}\nsources:", "compares learners: it is for `remanence run`"),
        ("artifacts:", "artifacts:\n  other: {call: remanence.parts.PretrainedViT, source: $digits}", "one artifact, this one 2: other"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(recipe, cache, capsys, old, new, message):
    assert old in TINY
    recipe.write_text(TINY.replace(old, new, 1), encoding="utf-8")
    assert message in refused(capsys, "meta-train", recipe)
    assert not cache.exists()


def test_a_recipe_without_artifacts(recipe, capsys):
    recipe.write_text("sources:\n  digits: {call: remanence.streams.digits}\n", encoding="utf-8")
    assert "the key 'artifacts' is missing or empty" in refused(capsys, "meta-train", recipe)


def test_an_artifact_of_another_kind(recipe, capsys):
    recipe.write_text(TINY.split("artifacts:")[0] + "artifacts: {vit: {call: remanence.parts.PretrainedViT, source: $digits}}\n")
    assert "artifact 'vit' is a PretrainedViT; meta-train takes those of remanence.generated" in refused(capsys, "meta-train", recipe)


def test_a_setting_without_a_value(recipe, capsys):
    assert "--set steps: write it as KEY=VALUE" in refused(capsys, "meta-train", recipe, "--set", "steps")


def test_a_recipe_that_is_nowhere(capsys):
    assert "Did you mean 'hypertransformer'" in refused(capsys, "meta-train", "hypertransfomer")


def test_broken_numbers_are_a_failure(recipe, capsys, monkeypatch):
    def broken(self, model, step):
        raise NonFiniteLoss("the loss became nan at step 0; lower lr.")

    monkeypatch.setattr(MetaTrainedHyperTransformer, "loss", broken)
    assert call("meta-train", recipe) == 1
    assert "lower lr" in capsys.readouterr().err


# --- the other commands, help and what ships -----------------------------------------------------------------------


def test_run_says_that_such_a_recipe_is_not_for_it(capsys):
    line = refused(capsys, "run", "hypertransformer")
    assert line.endswith("trains an artifact and compares nothing: it is for `remanence meta-train`.")


def test_meta_train_says_that_a_comparison_is_not_for_it(capsys):
    assert "compares learners: it is for `remanence run`" in refused(capsys, "meta-train", "digits-quick")


def test_the_help_has_an_example(capsys):
    assert call("meta-train", "--help") == 0
    assert "  remanence meta-train hypertransformer\n" in capsys.readouterr().out


def test_list_names_the_artifacts(capsys):
    assert call("list") == 0
    printed = capsys.readouterr().out
    assert "remanence.generated.MetaTrainedContinualHyperTransformer" in printed
    assert "remanence.parts.PretrainedViT" in printed


@pytest.mark.parametrize("name", ["hypertransformer", "continual-hypertransformer"])
def test_the_shipped_trainings_are_sound(name):
    from remanence.recipe import read_training

    tree = read_training(recipe_path(name)).tree
    assert tree["minutes"] < 15
    assert "MIT License" in tree["about"]
    assert yaml.safe_load(shipped()[name].read_text(encoding="utf-8")) == tree


def test_importing_the_command_line_loads_no_model_code():
    code = "import sys, remanence.cli; print('torch' in sys.modules, 'remanence.generated' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
