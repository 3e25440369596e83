"""A model comes back from its two files bit for bit, and folders that are not whole or not ours are refused with the reason."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from remanence.errors import DataError, StateMismatchError
from remanence.generated import (
    Episode,
    files,
    load_hypertransformer,
    model_fingerprint,
    save_hypertransformer,
    shipped_hypertransformer,
)
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import generator, keyed_rng
from remanence.state import states_equal

SMALL = {"max_ways": 3, "width": 8, "depth": 1, "heads": 2, "code_width": 4, "shared_features": 4}


def make(kind="plain", seed=0):
    target = TargetNet(2, image_size=8, n_layers=2, norm="group")
    with keyed_rng(seed):
        if kind == "continual":
            return ContinualHyperTransformer(target, "task", "gate", carry=False, renorm=True, label_codes="random", **SMALL)
        if kind == "paper":
            return HyperTransformer(target, preset="paper", max_ways=3)
        return HyperTransformer(target, generate=("conv2",), head="proto+delta", label_codes="random", **SMALL)


def episode():
    x = torch.rand(2, 9, 1, 8, 8, generator=generator("images"))
    return Episode(x[:, :6], torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), x[:, 6:])


@pytest.mark.parametrize("kind", ["plain", "continual", "paper"])
def test_a_model_comes_back_as_it_was(kind, tmp_path):
    model = make(kind)
    save_hypertransformer(model, tmp_path / "new" / "model", {"license": "MIT"})
    before = torch.get_rng_state()
    loaded = load_hypertransformer(tmp_path / "new" / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(model)
    assert loaded.target == model.target
    assert states_equal(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert files.describe_hypertransformer(tmp_path / "new" / "model")["about"] == {"license": "MIT"}


@torch.no_grad()
def test_a_loaded_model_answers_as_the_saved_one(tmp_path):
    model, continual = (make(kind).eval().requires_grad_(False) for kind in ("plain", "continual"))
    save_hypertransformer(model, tmp_path / "plain")
    save_hypertransformer(continual, tmp_path / "continual")
    assert torch.equal(load_hypertransformer(tmp_path / "plain")(episode()), model(episode()))
    loaded, task = load_hypertransformer(tmp_path / "continual"), episode()
    states = [one.step(one.init_state(2), task.support_x, task.support_y) for one in (continual, loaded)]
    assert torch.equal(continual.predict(states[0], task.query_x, task=0), loaded.predict(states[1], task.query_x, task=0))
    assert (loaded.scenario, loaded.update_form, loaded.carry, loaded.renorm) == ("task", "gate", False, True)


def test_a_fingerprint_is_of_settings_and_parameters():
    other = make()
    other.base["conv2"].data[0, 0] += 1e-6
    group, batch = (HyperTransformer(TargetNet(2, image_size=8, n_layers=2, norm=norm), **SMALL) for norm in ("group", "batch"))
    batch.load_state_dict(group.state_dict())
    found = [model_fingerprint(model) for model in (make(), make(seed=1), make("continual"), other, group, batch)]
    assert len(set(found)) == len(found)
    assert model_fingerprint(make()) == found[0]


def test_narrow_tensors_are_widened(tmp_path):
    model = make()
    save_hypertransformer(model.half(), tmp_path)
    loaded = load_hypertransformer(tmp_path)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.base["conv2"], model.base["conv2"].float())


def test_a_second_model_replaces_the_first_and_leaves_other_files(tmp_path):
    save_hypertransformer(make(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save_hypertransformer(make("continual"), tmp_path)
    assert isinstance(load_hypertransformer(tmp_path), ContinualHyperTransformer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypertransformer.json", "model.safetensors", "notes.txt"]


@pytest.mark.parametrize("failing", ["model.safetensors", "hypertransformer.json"])
def test_a_save_that_breaks_off_leaves_nothing_that_loads(failing, tmp_path, monkeypatch):
    save_hypertransformer(make(), tmp_path)
    write_whole = files.write_whole

    def breaks(path, content):
        if path.name == failing:
            raise OSError("disk full")
        write_whole(path, content)

    monkeypatch.setattr(files, "write_whole", breaks)
    with pytest.raises(OSError, match="disk full"):
        save_hypertransformer(make(seed=1), tmp_path)
    with pytest.raises(DataError, match=r"holds no hypertransformer\.json"):
        load_hypertransformer(tmp_path)


def test_what_cannot_be_told_in_json_destroys_nothing(tmp_path):
    save_hypertransformer(make(), tmp_path)
    with pytest.raises(TypeError):
        save_hypertransformer(make(), tmp_path, {"model": object()})
    load_hypertransformer(tmp_path)


def test_a_subclass_is_not_saved(tmp_path):
    class Mine(HyperTransformer):
        pass

    with pytest.raises(StateMismatchError, match="a Mine cannot be saved; the file format knows HyperTransformer, Continual"):
        save_hypertransformer(Mine(TargetNet()), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


# --- folders that are wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_hypertransformer(make(), tmp_path)
    return tmp_path


def describe(folder, **changes):
    path = folder / files.DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(folder, change):
    tensors = load_file(folder / files.TENSORS)
    change(tensors)
    save_file(tensors, folder / files.TENSORS)
    describe(folder, sha256=hashlib.sha256((folder / files.TENSORS).read_bytes()).hexdigest())


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(DataError, match=r"holds no hypertransformer\.json; give a folder that save_hypertransformer or `remanence meta-tr"):
        load_hypertransformer(tmp_path / "nowhere")


def test_a_description_that_is_no_json(folder):
    (folder / files.DESCRIPTION).write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        load_hypertransformer(folder)
    (folder / files.DESCRIPTION).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no JSON"):
        load_hypertransformer(folder)


@pytest.mark.parametrize("content", [[], {"format": 1}])
def test_a_description_that_says_too_little(folder, content):
    (folder / files.DESCRIPTION).write_text(json.dumps(content))
    with pytest.raises(StateMismatchError, match=r"lacks .*class, target, settings, sha256; save the model anew"):
        load_hypertransformer(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is of format 2, this version reads 1"),
        ({"class": "MergedHT"}, "holds a 'MergedHT'; this version knows HyperTransformer, ContinualHyperTransformer"),
        ({"settings": {"breadth": 3}}, r"describes no HyperTransformer of this version: .*breadth"),
        ({"settings": {"head": "best"}}, r"describes no HyperTransformer of this version: .*head='best'"),
        ({"target": {"n_layers": 9}}, "describes no HyperTransformer of this version: .*vanish after 9 halvings"),
        ({"target": 3}, "describes no HyperTransformer of this version"),
        ({"settings": {"max_ways": 5}}, r"tensors are missing, unknown or of another shape \(first three"),
        ({"sha256": "0" * 64}, r"model\.safetensors is not the file that hypertransformer\.json was written with"),
    ],
)
def test_a_description_of_another_model(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(StateMismatchError, match=message):
        load_hypertransformer(folder)


def test_tensors_that_are_missing(folder):
    (folder / files.TENSORS).unlink()
    with pytest.raises(DataError, match="is missing; copy both files"):
        load_hypertransformer(folder)


def test_tensors_that_are_none(folder):
    (folder / files.TENSORS).write_bytes(b"nothing")
    describe(folder, sha256=hashlib.sha256(b"nothing").hexdigest())
    with pytest.raises(StateMismatchError, match="is no safetensors file"):
        load_hypertransformer(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("base.conv2"),
        lambda tensors: tensors.update({"base.conv9": torch.zeros(1)}),
        lambda tensors: tensors.update({"base.conv2": torch.zeros(1, 2)}),
    ],
)
def test_tensors_of_another_model(folder, change):
    rewrite_tensors(folder, change)
    with pytest.raises(StateMismatchError, match=r"1 tensors are missing, unknown or of another shape \(first three: \['base.conv"):
        load_hypertransformer(folder)


# --- what ships ----------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_whole_small_and_says_where_it_comes_from():
    folder = shipped_hypertransformer()
    model = load_hypertransformer(folder)
    assert (folder / files.TENSORS).stat().st_size < 1_500_000
    assert (model.target.norm, model.target.image_size, model.max_ways, model.label_codes) == ("group", 28, 20, "random")
    about = files.describe_hypertransformer(folder)["about"]
    assert about["recipe"] == "hypertransformer"
    assert "MIT" in about["about"]
    assert "Omniglot" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_shipped_model_answers_a_query_by_itself():
    model = load_hypertransformer(shipped_hypertransformer())
    x = torch.rand(1, 30, 1, 28, 28, generator=generator("shipped"))
    weights = model.generate(x[:, :10], torch.arange(5).repeat(2)[None])
    together, alone = weights.logits(x[:, 10:]), torch.cat([weights.logits(query) for query in x[:, 10:].split(1, 1)], 1)
    torch.testing.assert_close(together, alone)
