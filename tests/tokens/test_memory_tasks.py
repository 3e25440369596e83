"""Tasks of a memory: adding, growing, asking for some, mixing them in a batch, and every refusal."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers import BeitConfig, BeitModel, Dinov2Config, Dinov2Model, SwinConfig, SwinModel
from vision_zoo import SIZE, backbone, images, memory_of, stir, train

from remanence.errors import SettingError, StateMismatchError
from remanence.tokens import MemoryViT


def test_a_new_task_starts_as_the_backbones_class_token_and_a_uniform_answer():
    memory = MemoryViT(backbone())
    task = memory.add_task("a", [3, 4, 5], tokens=4)
    assert task.memory.shape == (3, 4, 16)
    assert 0.015 < task.memory.std() < 0.025
    embeddings = memory.model.embeddings
    assert torch.equal(task.class_token, (embeddings.cls_token + embeddings.position_embeddings[:, :1])[0, 0])
    assert torch.equal(memory(images()).logits["a"], torch.zeros(4, 3))
    assert memory.add_task("b", [1], init="normal").class_token.std() < 0.05
    assert torch.equal(MemoryViT(backbone()).add_task("a", [3], tokens=4).memory, task.memory)
    assert not torch.equal(MemoryViT(backbone()).add_task("a", [3], tokens=4, seed=1).memory, task.memory)


@pytest.mark.parametrize(("mode", "layers", "has_token"), [("memory", 3, True), ("input", 1, True), ("class", 0, True), ("head", 0, False)])
def test_a_mode_owns_what_it_says_and_trains_it(mode, layers, has_token):
    memory = MemoryViT(backbone())
    task = memory.add_task("a", [0, 1], tokens=2, mode=mode)
    assert len(task.memory) == len(task.layers) == layers
    assert (task.class_token is not None) == has_token
    assert sum(p.numel() for p in memory.trainable_parameters("a")) == layers * 2 * 16 + 16 * has_token + 2 * 17
    before, labels = copy.deepcopy(task.state_dict()), torch.arange(16) % 2
    loss = F.cross_entropy(memory(images(16)).logits["a"], labels).item()
    train(memory, "a", images(16), labels, steps=30, lr=0.03)
    assert F.cross_entropy(memory(images(16)).logits["a"], labels).item() < loss - 0.01
    assert all(not torch.equal(before[key], value) for key, value in task.state_dict().items() if value.numel())


def test_tokens_0_is_a_class_token_alone():
    memory = MemoryViT(backbone())
    task = memory.add_task("a", [0, 1], tokens=0)
    assert task.layers == ()
    assert memory(images()).logits["a"].shape == (4, 2)


def test_answers_follow_what_is_written_into_a_task():
    """The keys kept for inference are made anew after a step, a load, a new head and a reused name."""
    memory = memory_of(backbone(), "a")

    def fresh():
        twin = MemoryViT(memory.model)
        twin.add_task("a", memory.task("a").classes, tokens=3)
        twin.task("a").load_state_dict(memory.task("a").state_dict())
        return twin(images(), ["a"]).logits["a"].detach()

    @torch.no_grad()
    def read():
        return memory(images()).logits["a"]

    seen = [read()]

    def changed():
        seen.append(read())
        assert torch.allclose(seen[-1], fresh(), atol=1e-6)
        assert not torch.equal(seen[-1], seen[-2])

    optimizer = torch.optim.AdamW(memory.trainable_parameters("a"), lr=1e-2, fused=True)
    F.cross_entropy(memory(images()).logits["a"], torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    changed()
    memory.task("a").load_state_dict({key: value + 1 for key, value in memory.task("a").state_dict().items()})
    changed()
    torch.nn.utils.vector_to_parameters(torch.full((3 * 3 * 16 + 16 + 34,), 0.1), memory.trainable_parameters("a"))
    changed()
    for round_ in range(3):  # an address may be used again
        memory.remove_task("a")
        memory.add_task("a", [0, 1], tokens=3)
        stir(memory, "a", seed=round_ + 5)
        changed()


def test_classes_can_be_added_to_a_task_and_then_trained():
    memory, pixels = memory_of(backbone(), "a", "b"), images(6)
    before = memory(pixels).logits["a"].detach()
    weight = memory.task("a").head.weight.detach().clone()
    memory.task("a").grow([1, 8, 9])
    assert memory.task("a").classes == [0, 1, 8, 9]
    after = memory(pixels).logits["a"].detach()
    assert torch.equal(memory.task("a").head.weight[:2], weight)
    assert torch.allclose(after[:, :2], before, atol=1e-6)
    assert torch.equal(after[:, 2:], torch.zeros(6, 2))
    train(memory, "a", pixels, torch.tensor([2, 3] * 3), steps=20, lr=0.1)
    assert memory(pixels).logits["a"].argmax(1).ge(2).all()
    head = memory.task("a").head
    memory.task("a").grow([0, 9])
    assert memory.task("a").head is head


def test_only_the_tasks_asked_for_are_answered():
    memory = memory_of(backbone(), "a", "b", "c")
    assert list(memory(images(), ["c", "a"]).logits) == ["c", "a"]
    assert memory(images(), []).logits == {}
    assert MemoryViT(backbone())(images()).logits == {}


def test_batches_of_none_and_of_one():
    memory = memory_of(backbone(), "a", "b")
    empty = memory(images(0))
    assert empty.base is None
    assert {name: logits.shape for name, logits in empty.logits.items()} == {"a": (0, 2), "b": (0, 2)}
    assert memory(images(1)).logits["a"].shape == (1, 2)


def test_every_image_of_a_batch_can_have_a_task_of_its_own():
    memory, pixels = memory_of(backbone(), "a", "b"), images(5)
    memory.add_task("c", [7, 8, 9], tokens=1, parents=["a"])
    stir(memory, "c")
    names = ["b", "c", "a", "c", "b"]
    logits = memory(pixels).logits
    mixed = memory.read_each(memory.view.capture(pixels), names)
    assert [len(row) for row in mixed] == [2, 3, 2, 3, 2]
    assert all(torch.allclose(row, logits[name][index], atol=1e-5) for index, (row, name) in enumerate(zip(mixed, names, strict=True)))
    with pytest.raises(SettingError, match="2 task names for 5 images"):
        memory.read_each(memory.view.capture(pixels), ["a", "b"])


@pytest.mark.parametrize("name", ["v1.0", "values", "task:a", "100%2E", "training", ""])
def test_any_name_will_do(name):
    memory = MemoryViT(backbone())
    memory.add_task(name, [0, 1])
    assert memory.tasks == [name]
    assert list(memory(images()).logits) == [name]


def test_a_copy_shares_nothing():
    memory = memory_of(backbone(), "a")
    wanted = memory(images(), ["a"]).logits["a"].detach()
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert torch.equal(twin(images()).logits["a"], wanted)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(images()).logits["a"].any()
        assert torch.equal(memory(images()).logits["a"], wanted)


def test_removing_a_task_that_others_read_from():
    memory = memory_of(backbone(), "a")
    memory.add_task("b", [2], parents=["a"])
    memory.add_task("c", [3], parents=["a", "b"])
    memory.add_task("d", [4])
    with pytest.raises(SettingError, match=r"'a' is read by \['b', 'c'\]; .* cascade=True"):
        memory.remove_task("a")
    assert memory.tasks == ["a", "b", "c", "d"]
    memory.remove_task("a", cascade=True)
    assert memory.tasks == ["d"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1}, r"tokens=-1 must lie in 0\.\.68 \(four times the backbone's 17 tokens\)"),
        ({"tokens": 69}, r"tokens=69 must lie in 0\.\.68"),
        ({"mode": "memmory"}, "mode='memmory' is unknown; give memory, input, class or head"),
        ({"parents": ["aa"]}, "no task 'aa'. Did you mean 'a'"),
        ({"name": "a"}, "task 'a' is there already"),
        ({"classes": []}, r"at least one class, each once; got \[\]"),
        ({"classes": [1, 2, 1]}, r"each once; got \[1, 2, 1\]"),
    ],
)
def test_settings_that_no_task_can_have(settings, message):
    memory = memory_of(backbone(), "a")
    with pytest.raises(SettingError, match=message):
        memory.add_task(**({"name": "new", "classes": [0, 1]} | settings))
    assert memory.tasks == ["a"]


def test_unknown_tasks_are_named_with_the_nearest():
    memory = memory_of(backbone(), "flowers", "birds")
    for ask in (memory.task, memory.remove_task, memory.trainable_parameters, lambda name: memory(images(), [name])):
        with pytest.raises(SettingError, match=r"no task 'flower'. Did you mean 'flowers'\? Known here: birds, flowers"):
            ask("flower")


def test_a_pass_of_another_model_is_refused():
    memory = memory_of(backbone(), "a")
    other = memory_of(backbone(seed=1), "a")
    with pytest.raises(StateMismatchError, match="captured on another ViTModel"):
        memory.read(other.view.capture(images()))


def test_a_backbone_put_into_training_mode_is_refused():
    memory = memory_of(backbone(), "a")
    memory.train()
    assert not memory.model.training
    memory.model.train()
    with pytest.raises(SettingError, match=r"ViTModel is in training mode.*call eval\(\)"):
        memory(images())


SWIN = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwinModel(SwinConfig(**SWIN)), "SwinModel has none of layers, encoder.layer, blocks; give a ViT"),
        (lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), "Sequential has none of layers"),
        (lambda: BeitModel(BeitConfig(**SIZE, use_mean_pooling=True)), "reads its answer from the mean of its patches"),
        (lambda: BeitModel(BeitConfig(**SIZE, use_mean_pooling=False, use_relative_position_bias=True)), "layer 0 .* plain pre-norm"),
    ],
)
def test_architectures_that_are_not_supported_are_refused(make, message):
    with pytest.raises(SettingError, match=message):
        MemoryViT(make())


class Altered(torch.nn.Module):
    """A layer around a layer that computes something else with the same parts."""

    def __init__(self, layer, change):
        super().__init__()
        self.layernorm_before, self.layernorm_after = layer.layernorm_before, layer.layernorm_after
        self.attention, self.mlp, self.change = layer.attention, layer.mlp, change

    def forward(self, hidden, mask=None, **_):
        if self.change == "parallel":
            return hidden + self.attention(self.layernorm_before(hidden))[0] + self.mlp(self.layernorm_after(hidden))
        turned = torch.roll(hidden, 1, -1) if self.change == "rotary" else hidden
        hidden = hidden + self.attention(self.layernorm_before(turned))[0]
        return hidden + self.mlp(self.layernorm_after(hidden))


@pytest.mark.parametrize("change", ["parallel", "rotary"])
def test_a_layer_that_computes_something_else_is_named(change):
    model = backbone()
    model.layers[1] = Altered(model.layers[1], "none")
    MemoryViT(model)
    model.layers[1] = Altered(model.layers[1], change)
    with pytest.raises(SettingError, match=r"layer 1 \(Altered\) does not compute plain pre-norm attention and MLP.*differs by"):
        MemoryViT(model)


def test_a_few_units_a_thousand_times_larger_than_the_rest_are_no_mismatch():
    model = backbone()
    with torch.no_grad():
        model.embeddings.position_embeddings[..., 3] += 3000
    MemoryViT(model)


def test_swiglu_and_registers_count_as_plain_layers():
    memory = memory_of(Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2, use_swiglu_ffn=True)), "a")
    assert memory(images()).logits["a"].shape == (4, 2)
