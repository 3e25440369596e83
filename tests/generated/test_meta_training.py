"""Meta-training resumes bit for bit, keeps its best checkpoint, stops early, and never trains on what it is validated on."""

import json

import pytest
import torch

from remanence.artifact import materialise
from remanence.errors import DataError, NonFiniteLoss, SettingError
from remanence.generated import (
    MetaTrainedContinualHyperTransformer,
    MetaTrainedHyperTransformer,
    load_hypertransformer,
    meta_training,
    require_disjoint,
)
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.meta_trainer import episode_loss
from remanence.keys import generator
from remanence.state import all_finite, load_state, states_equal
from remanence.streams import Source
from remanence.task import example_ids

TINY = {"channels": 2, "n_layers": 2, "width": 8, "depth": 1, "ways": 2, "shots": 1, "queries": 2, "max_ways": 3, "valid_share": 0.3}
SHORT = {"steps": 6, "every": 2}


@pytest.fixture(scope="module")
def source():
    """Fourteen classes of five 8 x 8 images: a class is a column of light at its own place, with noise."""
    labels = torch.arange(14).repeat_interleave(5)
    draw = torch.Generator().manual_seed(0)
    images = 0.3 * torch.rand(70, 1, 8, 8, generator=draw)
    images.flatten(1)[torch.arange(70), labels * 4] += 0.7
    names = {label: str(label) for label in range(14)}
    return Source("lights", images, labels, example_ids("lights", torch.arange(70)), torch.zeros(70, dtype=torch.bool), names)


def plain(source, **settings):
    return MetaTrainedHyperTransformer(source, **{"tasks": 2, **TINY, **SHORT, **settings})


def continual(source, **settings):
    return MetaTrainedContinualHyperTransformer(source, **{"sequences": 2, "n_tasks": 2, **TINY, **SHORT, **settings})


@pytest.fixture(params=[plain, continual], ids=["plain", "continual"])
def make(request, monkeypatch):
    monkeypatch.setattr(meta_training, "_VALIDATION_TASKS", 3)
    return request.param


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the result ----------------------------------------------------------------------------------------------------


def test_the_folder_holds_a_model_and_its_curve(make, source, tmp_path):
    artifact = make(source)
    folder = materialise(artifact, cache=tmp_path)
    assert sorted(files(folder)) == ["header.json", "hypertransformer.json", "model.safetensors", "training.json"]
    model = load_hypertransformer(folder)
    assert type(model) is (HyperTransformer if make is plain else ContinualHyperTransformer)
    assert (model.target.channels, model.target.norm, model.max_ways) == (2, "group", 3)
    report = json.loads((folder / "training.json").read_text())
    assert [row["step"] for row in report["curve"]] == [2, 4, 6]
    assert report["valid_accuracy"] == max(row["valid_accuracy"] for row in report["curve"])
    assert report["n_parameters"] == sum(value.numel() for value in model.parameters())
    assert report["bytes"] == 4 * report["n_parameters"]
    header = json.loads((folder / "header.json").read_text())
    assert header["saw"] == sorted(source.ids.tolist())
    assert header["classes"] == list(range(14))


def test_training_helps(source, tmp_path):
    # the continual form learns the same way, through `continual_loss`
    report = json.loads((materialise(plain(source, steps=150, every=50, tasks=6), cache=tmp_path) / "training.json").read_text())
    losses = [row["loss"] for row in report["curve"]]
    assert report["valid_accuracy"] > 0.7
    assert losses[-1] < 0.55


def test_a_generated_head_warms_up_beside_class_means(source):
    artifact, without = plain(source, head="generated", steps=8), plain(source, steps=8)
    model = artifact.make()
    for step, share in ((0, 1), (2, 0.5), (4, 0), (7, 0)):
        episode = artifact._train.sample(step)
        by_means = episode_loss(model.answers(episode, generator(0, "codes", step))[1], episode).item()
        extra = artifact.loss(model, step)[0].item() - without.loss(model, step)[0].item()
        assert extra == pytest.approx(share * by_means, abs=1e-5)


@pytest.mark.parametrize("settings", [{"scenario": "task"}, {"n_tasks": (1, 2)}, {"label_codes": "random"}, {"update": "gate"}], ids=str)
def test_the_continual_form_is_trained_as_it_is_asked(source, tmp_path, settings, monkeypatch):
    monkeypatch.setattr(meta_training, "_VALIDATION_TASKS", 20)
    whole = continual(source, **settings)
    list(whole.build(tmp_path))
    model = load_hypertransformer(tmp_path)
    assert (model.scenario, model.update_form) == (settings.get("scenario", "class"), settings.get("update", "add"))
    assert whole.fingerprint() != continual(source).fingerprint()
    assert 0.2 < json.loads((tmp_path / "training.json").read_text())["valid_accuracy"] <= 1


def test_images_are_counted(make, source, tmp_path):
    n_images = {step.n_examples for step in make(source).build(tmp_path)}
    per_task = 2 * (1 + 2)
    assert n_images == {2 * per_task * (1 if make is plain else 2)}


def test_a_sketch_is_a_model_without_training(make, source, tmp_path):
    artifact = make(source)
    artifact.sketch(tmp_path)
    model, untrained = load_hypertransformer(tmp_path), artifact.make()
    assert states_equal(dict(model.state_dict()), dict(untrained.state_dict()))
    assert json.loads((tmp_path / "header.json").read_text()) == artifact.header()


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_done", [1, 2, 3, 5, 6])
def test_an_interrupted_training_ends_with_the_same_bits(make, source, tmp_path, n_done):
    whole = materialise(make(source), cache=tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(step):
        if step.step == n_done:
            raise KilledError

    with pytest.raises(KilledError):
        materialise(make(source), kill, tmp_path / "cut")
    assert not any((folder / "header.json").exists() for folder in (tmp_path / "cut").iterdir())
    steps = []
    resumed = materialise(make(source), lambda step: steps.append(step.step), tmp_path / "cut")
    assert steps == list(range(n_done // 2 * 2 + 1, 7))
    assert files(resumed) == files(whole)


def test_a_kill_while_the_result_is_written_loses_nothing(make, source, tmp_path, monkeypatch):
    whole = materialise(make(source), cache=tmp_path / "whole")
    save = meta_training.save_hypertransformer
    monkeypatch.setattr(meta_training, "save_hypertransformer", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        materialise(make(source), cache=tmp_path / "cut")
    monkeypatch.setattr(meta_training, "save_hypertransformer", save)
    assert files(materialise(make(source), cache=tmp_path / "cut")) == files(whole)


def test_the_callers_random_numbers_do_not_matter(make, source, tmp_path):
    before = torch.get_rng_state()
    first = materialise(make(source), cache=tmp_path / "first")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert files(materialise(make(source), cache=tmp_path / "second")) == files(first)


# --- best checkpoint, early stop, broken numbers -------------------------------------------------------------------


def scripted(artifact, monkeypatch, accuracies):
    """Let the validations of an artifact find these accuracies; returns the parameters at each."""
    seen, left = [], list(accuracies)

    def accuracy(model, step):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return left.pop(0)

    monkeypatch.setattr(artifact, "_validate", accuracy)
    return seen


def test_the_best_checkpoint_is_kept_and_of_equal_ones_the_first(make, source, tmp_path, monkeypatch):
    artifact = make(source, steps=8)
    seen = scripted(artifact, monkeypatch, [0.2, 0.6, 0.6, 0.1])
    folder = materialise(artifact, cache=tmp_path)
    assert states_equal(dict(load_hypertransformer(folder).state_dict()), seen[1])
    report = json.loads((folder / "training.json").read_text())
    assert (report["best_step"], report["steps"], report["stopped_early"]) == (4, 8, False)


def test_training_stops_when_nothing_gets_better(make, source, tmp_path, monkeypatch):
    artifact = make(source, steps=100, patience=2)
    seen = scripted(artifact, monkeypatch, [0.2, 0.6, 0.5, 0.7, 0.7, 0.6])
    folder = materialise(artifact, cache=tmp_path)
    assert states_equal(dict(load_hypertransformer(folder).state_dict()), seen[3])
    report = json.loads((folder / "training.json").read_text())
    assert (report["best_step"], report["steps"], report["stopped_early"]) == (8, 12, True)


def test_the_last_step_is_validated_whatever_the_rhythm(source, tmp_path, monkeypatch):
    monkeypatch.setattr(meta_training, "_VALIDATION_TASKS", 3)
    list(plain(source, steps=3).build(tmp_path))
    assert [row["step"] for row in json.loads((tmp_path / "training.json").read_text())["curve"]] == [2, 3]


def test_a_loss_that_is_no_number_stops_and_the_last_good_state_stays(make, source, tmp_path, monkeypatch):
    whole = materialise(make(source), cache=tmp_path / "whole")
    artifact = make(source)
    good = artifact.loss
    monkeypatch.setattr(artifact, "loss", lambda model, step: (good(model, step)[0] * (torch.nan if step == 3 else 1), 1))
    with pytest.raises(NonFiniteLoss, match="became nan at step 3; lower lr"):
        materialise(artifact, cache=tmp_path / "cut")
    (partial,) = (tmp_path / "cut").glob("*.partial")
    state = load_state(partial / "training.safetensors")
    assert state["trainer"]["step"] == 2
    assert all_finite(state)
    assert files(materialise(make(source), cache=tmp_path / "cut")) == files(whole)


def test_parameters_that_are_no_numbers_are_never_saved(make, source, tmp_path, monkeypatch):
    artifact = make(source)
    broken = artifact.make()
    broken.log_scale.data.fill_(torch.inf)
    monkeypatch.setattr(artifact, "make", lambda: broken)
    monkeypatch.setattr(artifact, "loss", lambda model, step: (model.shared.convs[0].bias.square().sum(), 1))
    with pytest.raises(NonFiniteLoss, match="parameters are no longer finite at step 2"):
        list(artifact.build(tmp_path))
    assert not list(tmp_path.iterdir())


# --- held-out classes and settings ---------------------------------------------------------------------------------


def test_held_out_classes_are_never_trained_on(make, source):
    artifact = make(source)
    require_disjoint(artifact.trained_on, artifact.validated_on)
    assert sorted(artifact.trained_on.classes + artifact.validated_on.classes) == list(source.classes)
    assert len(artifact.validated_on.classes) == 4
    assert make(source, seed=1).validated_on.classes != artifact.validated_on.classes
    model = artifact.make()
    artifact.loss(model, 0)
    names = {name for sampler in (artifact._train,) for episode in _episodes(sampler) for row in episode.class_names for name in row}
    assert not names & {source.class_names[label] for label in artifact.validated_on.classes}


def _episodes(sampler):
    for step in range(20):
        drawn = sampler.sample(step)
        yield from drawn if isinstance(drawn, tuple) else (drawn,)


def test_a_few_classes_are_enough_for_a_task_to_validate_on(source):
    assert len(plain(source, valid_share=0.01, ways=(2, 3)).validated_on.classes) == 3
    assert len(continual(source, valid_share=0.01, n_tasks=(1, 2)).validated_on.classes) == 4


def test_validation_episodes_are_not_those_of_training(make, source):
    artifact = make(source)
    model = artifact.make()
    assert torch.equal(artifact.accuracies(model, 0), artifact.accuracies(model, 0))
    assert not make(source, quarter_turns=True)._valid._pool.n_turns > 1


@pytest.mark.parametrize(
    "change",
    [{"channels": 3}, {"width": 16}, {"ways": 3}, {"steps": 7}, {"lr": 1e-3}, {"seed": 1}, {"patience": 1}, {"every": 3},
     {"quarter_turns": True}, {"max_ways": 4}, {"label_codes": "learned"}, {"valid_share": 0.4}],
)  # fmt: skip
def test_every_setting_makes_another_artifact(source, change):
    assert plain(source, **change).fingerprint() != plain(source).fingerprint()


def test_a_range_is_a_setting_as_yaml_gives_it(source):
    artifact = plain(source, ways=(2, 3), shots=(1, 2))
    assert artifact.settings()["ways"] == [2, 3]
    json.dumps(artifact.settings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"every": 0}, "every=0 must be 1 or more"),
        ({"patience": -1}, "patience=-1 must be 0 or more"),
        ({"lr": 0.0}, r"lr=0\.0 must be above 0"),
        ({"valid_share": 0.0}, r"valid_share=0\.0 must lie between 0 and 1"),
        ({"valid_share": 1.0}, r"valid_share=1\.0 must lie between 0 and 1"),
        ({"valid_share": 0.99}, r"'lights' has 14 classes; valid_share=0\.99 and tasks of \d classes leave none to train on"),
        ({"ways": 14, "max_ways": 14, "n_tasks": 1}, "tasks of 14 classes leave none to train on. Lower ways or n_tasks"),
        ({"ways": 4}, "ways=4 asks for up to 4 classes, max_ways=3; raise max_ways"),
        ({"ways": 8, "max_ways": 8, "n_tasks": 1}, "8 different classes are needed, 'lights to train on' has 6"),
        ({"n_layers": 4}, "vanish after 4 halvings"),
    ],
)
def test_settings_that_cannot_be(make, source, settings, message):
    if make is plain:
        settings = {name: value for name, value in settings.items() if name != "n_tasks"}
    with pytest.raises(SettingError, match=message):
        make(source, **settings)


def test_a_range_of_ways_beyond_the_most(source):
    with pytest.raises(SettingError, match=r"ways=\(2, 4\) asks for up to 4 classes"):
        plain(source, ways=(2, 4))


def test_a_class_of_too_few_images(source):
    with pytest.raises(DataError, match="has 5 rows, shots, unlabelled and queries need 6"):
        plain(source, queries=4, unlabeled=1)


def test_images_that_are_not_square(source):
    wide = Source("wide", source.images[..., :6], source.labels, source.ids, source.is_test, source.class_names)
    with pytest.raises(DataError, match="'wide': images of 8 x 6 pixels; the target CNN takes square ones"):
        plain(wide)
