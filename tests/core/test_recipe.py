"""Every mistake in a recipe is named with its key, its line and what would be right."""

# ruff: noqa: E501 - one mistake a line

import pytest
import yaml
from recipe_files import GOOD

from remanence.calls import build, find
from remanence.errors import RecipeError
from remanence.recipe import read_recipe


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_good_recipe_is_read(write):
    recipe = read_recipe(write(GOOD))
    assert (recipe.name, recipe.seeds, recipe.device, recipe.is_stated) == ("tiny", [0, 1], "cpu", True)
    assert recipe.grid() == [("in turn", "tuned"), ("in turn", "means")]


def test_the_run_is_the_hash_of_what_decides_the_result(write):
    run = read_recipe(write(GOOD)).run
    assert read_recipe(write(GOOD + "about: words\nminutes: 3\n")).run == run
    assert read_recipe(write(GOOD.replace("[0, 1]", "[0, 2]"))).run != run
    assert read_recipe(write(GOOD), {"learners.tuned.lr": "2e-3"}).run != run


WRONG = {
    "a wrong section": ("seeds: [0, 1]", "seed: [0, 1]", r"mine.yaml, line 16: seed: unknown key. Did you mean 'seeds'"),
    "a wrong setting": ("epochs: 1, lr", "epoch: 1, lr", r"line 10: learners.tuned.epoch: .*FineTuning has no setting 'epoch'. Did you mean 'epochs'"),
    "a wrong module": ("remanence.weights.Proto", "remanence.wheights.Proto", r"line 11: learners.means.call: cannot import 'remanence.wheights'"),
    "a wrong class": ("weights.Prototypes", "weights.Prototype", r"line 11: .*'remanence.weights' has no 'Prototype'. Did you mean 'Prototypes'"),
    "no import path": ("remanence.weights.Prototypes", "Prototypes", r"'Prototypes' is no import path; write package.module.Name"),
    "a wrong type": ("lr: 1e-3", "lr: fast", r"line 10: learners.tuned.lr: must be float, got 'fast'"),
    "a wrong whole number": ("per_task: 2", "per_task: 2.5", r"line 8: streams.in turn.per_task: must be int, got 2.5"),
    "a missing argument": ("source: $new, per_task: 2", "per_task: 2", r"line 8: streams.in turn: .*split_classes needs source"),
    "an unknown name": ("source: $new", "source: $knew", r"line 8: streams.in turn.source: nothing is named 'knew'. Did you mean 'new'"),
    "twice the same seed": ("[0, 1]", "[1, 1]", r"line 16: seeds: must be different whole numbers, got \[1, 1\]"),
    "seeds that are words": ("[0, 1]", "[a, b]", r"line 16: seeds: must be different whole numbers"),
    "seeds that are statements": ("[0, 1]", "[true, 0]", r"line 16: seeds: must be different whole numbers"),
    "a single seed": ("[0, 1]", "3", r"line 16: seeds: must be a list, got 3"),
    "no seeds": ("[0, 1]", "[]", r"the key 'seeds' is missing or empty"),
    "no call": ("{call: remanence.probes.Accuracy, at: log}", "accuracy", r"line 15: probes.0: needs a `call:` with an import path, got 'accuracy'"),
    "no YAML": ("seeds: [0, 1]", "seeds: [0, 1", r"mine.yaml is not valid YAML"),
    "a cell with an unknown stream": ("stream: in turn", "stream: in turns", r"line 13: cells.0: no stream 'in turns'. Did you mean 'in turn'"),
    "a cell with an unknown learner": ("{stream: in turn}", "{stream: in turn, learners: [tune]}", r"line 13: cells.0: no learner 'tune'. Did you mean 'tuned'"),
    "a cell that is none": ("{stream: in turn}", "{learners: [tuned]}", r"line 13: cells.0: a cell is \{stream: name, learners: \[names\]\}"),
    "a name given twice": ("  old:", "  in turn: {call: recipe_files.shapes}\n  old:", r"'in turn' stands twice among sources, artifacts and streams"),
    "a section of another kind": ("  - {stream: in turn}", "  stream: in turn", r"cells: must be a list, got"),
    "a name that is a number": ("  means:", "  3:", r"line 11: learners.3: a name must be text, got 3; put it in quotes"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named(write, old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(RecipeError, match=message) as raised:
        read_recipe(write(GOOD.replace(old, new)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "3"])
def test_what_is_no_mapping_is_no_recipe(write, text):
    with pytest.raises(RecipeError, match=r"mine.yaml.*: a recipe is a mapping with the keys streams, learners, probes, seeds"):
        read_recipe(write(text))


def test_an_absent_file(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe at .*nowhere.yaml. Give a YAML file, or a name"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_overrides_change_what_is_there(write):
    recipe = read_recipe(write(GOOD), {"learners.tuned.lr": "1e-2", "seeds": "[5]", "probes.0.at": "event"})
    assert recipe.tree["learners"]["tuned"]["lr"] == "1e-2" or recipe.tree["learners"]["tuned"]["lr"] == 0.01
    assert (recipe.seeds, recipe.tree["probes"][0]["at"], recipe.is_stated) == ([5], "event", False)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learner.tuned.lr", "1", r"--set learner.tuned.lr: .*mine.yaml has no 'learner'. Did you mean 'learners'"),
        ("learners.tune.lr", "1", r"has no 'learners.tune'. Did you mean 'tuned'"),
        ("learners.tuned.lrr", "1", r"learners.tuned.lrr: .* has no setting 'lrr'. Did you mean 'lr'"),
        ("learners.tuned.lr", "fast", r"must be float, got 'fast'"),
        ("probes.7.at", "1", r"has no 'probes.7'. Known here: 0"),
        ("name.first", "x", r"'name' of .*mine.yaml has no keys; it is 'tiny'"),
        ("seeds", "[0, 1", r"--set seeds: '\[0, 1' is not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(write, key, value, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(GOOD), {key: value})


def test_a_class_of_ones_own_file_is_found_and_built(write, tmp_path, monkeypatch):
    (tmp_path / "my_own_learner.py").write_text("class Mine:\n    def __init__(self, size: int = 1, seed: int = 0) -> None:\n        self.got = (size, seed)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = build({"call": "my_own_learner.Mine", "size": 4}, lambda name: name, {"seed": 9, "device": "cpu"})
    assert made.got == (4, 9)


def test_yaml_numbers_become_the_type_that_is_asked_for():
    from remanence.weights import LoRA

    assert find("remanence.weights.LoRA") is LoRA
    lr = yaml.safe_load("1e-3")
    assert isinstance(lr, str)  # YAML 1.1 takes it for text
    captured = build({"call": "recipe_files.shapes", "name": "x"}, lambda name: name, {})
    assert captured.name == "x"
