"""Other people's models as hosts: folders that work, folders that do not."""

import json

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from remanence.errors import DataError, SettingError
from remanence.keys import keyed_rng
from remanence.learner import fit
from remanence.parts import VisionHost
from remanence.parts.hosts import no_progress_bar
from remanence.weights import FineTuning, LoRA, Prototypes

SIZE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save(model, folder):
    with no_progress_bar():
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def plain(tmp_path):
    with keyed_rng("plain"):
        return save(ViTModel(ViTConfig(**SIZE, intermediate_size=32), add_pooling_layer=False), tmp_path / "plain")


@pytest.fixture
def classifier(tmp_path):
    with keyed_rng("classifier"):
        return save(ViTForImageClassification(ViTConfig(**SIZE, intermediate_size=32, num_labels=3)), tmp_path / "classifier")


def test_a_folder_of_a_bare_model(plain, tasks):
    host = VisionHost.load(plain)
    assert (host.name, host.classes, host.old_head, host.width) == ("plain", (), None, 16)
    assert host(tasks[0].test.inputs).shape == (32, 16)
    assert host(tasks[0].test.inputs[:0]).shape == (0, 16)
    assert not host.training
    with pytest.raises(SettingError, match="came without a head"):
        host.answer_old(host(tasks[0].test.inputs))


def test_a_folder_with_a_pooling_layer(tmp_path, tasks):
    with keyed_rng("pooled"):
        model = ViTModel(ViTConfig(**SIZE, intermediate_size=32)).eval()
    host = VisionHost.load(save(model, tmp_path / "pooled"))
    wanted = model(pixel_values=(tasks[0].test.inputs - 0.5) / 0.5).last_hidden_state[:, 0]
    assert torch.allclose(host(tasks[0].test.inputs), wanted, atol=1e-6)


def test_a_folder_of_a_classifier_answers_its_old_task(classifier, tasks):
    host = VisionHost.load(classifier)
    assert host.classes == (0, 1, 2)
    with no_progress_bar():
        model = ViTForImageClassification.from_pretrained(classifier).eval()
    wanted = model(pixel_values=(tasks[0].test.inputs - 0.5) / 0.5).logits
    assert torch.allclose(host.answer_old(host(tasks[0].test.inputs)).logits, wanted, atol=1e-6)


def test_header_and_pixel_statistics_are_read(classifier, tasks):
    (classifier / "header.json").write_text(json.dumps({"name": "letters", "classes": [7, 8, 9]}))
    (classifier / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.3], "image_std": [0.25]}))
    host = VisionHost.load(classifier)
    assert (host.name, host.classes) == ("letters", (7, 8, 9))
    assert (host.mean, host.std) == (pytest.approx(0.2), 0.25)
    learner = Prototypes(classifier)
    assert learner.predict(tasks[0].test.inputs, "letters").classes.tolist() == [7, 8, 9]


@pytest.mark.parametrize("cls", [FineTuning, LoRA])
def test_learners_take_a_folder_and_leave_the_next_one_a_clean_copy(classifier, tasks, cls):
    before = {name: value.clone() for name, value in VisionHost.load(classifier).state_dict().items()}
    fit(cls(str(classifier), epochs=1), tasks[0])
    after = VisionHost.load(classifier).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_host_in_memory_is_copied(tiny_vit):
    host = VisionHost(tiny_vit, "mine")
    first = VisionHost.load(host)
    with torch.no_grad():
        next(first.vit.parameters()).zero_()
    assert next(tiny_vit.parameters()).abs().sum() > 0
    assert first.name == "mine"


def test_images_of_another_size_are_refused(tiny_vit):
    host = VisionHost.load(tiny_vit)
    for shape in ((2, 1, 9, 9), (2, 3, 8, 8), (2, 8, 8)):
        with pytest.raises(DataError, match=r"'t'.*\(1, 8, 8\)"):
            host.require_fit(torch.zeros(shape), "t")
    host.require_fit(torch.zeros(0, 1, 8, 8), "t")


def test_folders_that_hold_no_vit(tmp_path):
    with pytest.raises(SettingError, match=r"nowhere has no config.json \(no such folder\)"):
        VisionHost.load(tmp_path / "nowhere")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(SettingError, match=r"has no config.json \(\['readme.txt'\]\).*save_pretrained of a ViT"):
        VisionHost.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SettingError, match=r"is a 'bert' model; this learner takes a ViT folder"):
        VisionHost.load(tmp_path)
