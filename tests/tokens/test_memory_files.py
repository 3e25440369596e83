"""Memories on disk: trained apart, joined later, refused where they do not belong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vision_zoo import backbone, images, memory_of, stir, train

from remanence.errors import NonFiniteLoss, SettingError, StateMismatchError
from remanence.tokens import MemoryViT, from_pretrained, load_task, save_pretrained, save_task
from remanence.tokens.files import fingerprint


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_tasks_trained_apart_stand_side_by_side(tmp_path):
    pixels, base = images(7), backbone()(images(7)).last_hidden_state
    alone = {}
    for index, name in enumerate(("a", "b", "c")):
        memory = memory_of(backbone(), name)
        train(memory, name, images(8, seed=index), torch.arange(8) % 2)
        save_pretrained(memory, tmp_path / name)
        alone[name] = (memory.task(name).state_dict(), memory(pixels).logits[name].detach())
    joined = from_pretrained(backbone(), tmp_path / "a", tmp_path / "b", tmp_path / "c")
    again = from_pretrained(backbone(), tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert joined.tasks == ["a", "b", "c"]
    output, twin = joined(pixels), again(pixels)
    assert torch.equal(output.base.last_hidden_state, base)
    for name, (state, logits) in alone.items():
        assert same(joined.task(name).state_dict(), state)
        assert (output.logits[name] - logits).abs().max() <= 1e-5
        assert torch.equal(output.logits[name], twin.logits[name])


def test_all_that_a_task_is_comes_back(tmp_path):
    memory = memory_of(backbone(), "a")
    memory.add_task("b.1", [7], tokens=1, mode="input", parents=["a"], norm="post")
    memory.add_task("c", [3, 9], mode="head")
    memory.add_task("d", range(4), mode="class", parents=["a", "b.1"])
    for name in memory.tasks:
        stir(memory, name)
    paths = save_pretrained(memory, tmp_path / "all")
    assert [path.name for path in paths] == [f"{index:06d}.safetensors" for index in range(4)]
    twin = from_pretrained(backbone(), tmp_path / "all")
    assert twin.mask_table() == memory.mask_table()
    for name in memory.tasks:
        here, there = memory.task(name), twin.task(name)
        assert same(here.state_dict(), there.state_dict())
        assert (here.classes, here.layers, here.parents, here.norm) == (there.classes, there.layers, there.parents, there.norm)
        assert torch.equal(memory(images()).logits[name], twin(images()).logits[name])
    train(twin, "d", images(), torch.arange(4))


def test_a_file_is_as_large_as_the_task_and_holds_no_backbone(tmp_path):
    memory = MemoryViT(backbone())
    memory.add_task("a", range(10), tokens=5)
    path = save_task(memory, "a", tmp_path / "a.safetensors")
    n_bytes = 4 * (3 * 5 * 16 + 16 + 10 * 17)
    assert n_bytes < path.stat().st_size < n_bytes + 1024
    assert set(load_file(path)) == {"memory", "class_token", "head.weight", "head.bias"}


def test_forgetting_takes_a_tasks_own_bytes_from_the_folder(tmp_path):
    memory = memory_of(backbone(), "a", "b", "c")
    sizes = [path.stat().st_size for path in save_pretrained(memory, tmp_path / "before")]
    memory.remove_task("b")
    after = [path.stat().st_size for path in save_pretrained(memory, tmp_path / "after")]
    assert sum(sizes) - sum(after) == sizes[1]
    with pytest.raises(SettingError, match=r"holds 2 memories already \(000000.safetensors"):
        save_pretrained(memory, tmp_path / "after")


def test_another_backbone_is_refused_with_both_fingerprints(tmp_path):
    path = save_task(memory_of(backbone(), "a"), "a", tmp_path / "a.safetensors")
    other = MemoryViT(backbone(seed=1))
    here, there = fingerprint(other.model), fingerprint(backbone())
    assert here != there
    with pytest.raises(StateMismatchError, match=f"trained on backbone {there} .*this one is {here} .*'layers': 3"):
        load_task(other, path)
    assert other.tasks == []
    edited = backbone()
    with torch.no_grad():
        edited.layers[2].mlp.fc1.bias[0] += 1e-3
    with pytest.raises(StateMismatchError, match=there):
        from_pretrained(edited, tmp_path)


def test_a_classifier_and_its_bare_model_are_one_backbone(tmp_path):
    classifier = backbone("ViTForImageClassification")
    path = save_task(memory_of(classifier, "a"), "a", tmp_path / "a.safetensors")
    assert load_task(MemoryViT(classifier.vit), path) == "a"


def test_names_that_are_taken(tmp_path):
    memory = memory_of(backbone(), "a")
    memory.add_task("b", [5], parents=["a"])
    save_pretrained(memory, tmp_path / "one")
    other = memory_of(backbone(), "a", seed=3)
    other.add_task("b", [6], parents=["a"])
    save_pretrained(other, tmp_path / "two")
    with pytest.raises(SettingError, match="task 'a' is there already"):
        load_task(memory, tmp_path / "one" / "000000.safetensors")
    joined = from_pretrained(backbone(), tmp_path / "one", tmp_path / "two")
    assert joined.tasks == ["a", "b", "a (2)", "b (2)"]
    assert joined.task("b (2)").parents == ("a (2)",)
    assert same(joined.task("a (2)").state_dict(), other.task("a").state_dict())
    assert load_task(memory, tmp_path / "two" / "000000.safetensors", "mine") == "mine"
    load_task(memory, tmp_path / "two" / "000001.safetensors", "theirs", parents={"a": "mine"})
    assert memory.task("theirs").parents == ("mine",)


def test_a_parent_that_is_missing_is_named(tmp_path):
    memory = memory_of(backbone(), "a")
    memory.add_task("b", [5], parents=["a"])
    path = save_task(memory, "b", tmp_path / "b.safetensors")
    with pytest.raises(SettingError, match=r"'b' reads from \['a'\], which are not loaded"):
        load_task(MemoryViT(backbone()), path)


def test_what_is_no_memory(tmp_path):
    memory = MemoryViT(backbone())
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "later.safetensors", metadata={"memory": json.dumps({"format": 2})})
    for name in ("text", "weights", "absent"):
        with pytest.raises(StateMismatchError, match=f"{name}.safetensors is not the file of a memory"):
            load_task(memory, tmp_path / f"{name}.safetensors")
    with pytest.raises(StateMismatchError, match="is of format 2, this version reads 1"):
        load_task(memory, tmp_path / "later.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateMismatchError, match=r"empty holds no .safetensors file"):
        from_pretrained(backbone(), tmp_path / "empty")


def test_a_broken_task_is_not_saved(tmp_path):
    memory = memory_of(backbone(), "a")
    with torch.no_grad():
        memory.task("a").memory[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss, match=r"\['memory'\] of task 'a' hold a NaN"):
        save_task(memory, "a", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SettingError, match="no task 'b'"):
        save_task(memory, "b", tmp_path / "b.safetensors")
