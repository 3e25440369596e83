"""The side stream against one masked sequence after Table 1 of the paper: values, gradients, and what a wrong mask does."""

import pytest
import torch
from torch.nn import functional as F
from vision_zoo import allowed, backbone, images, masked_sequence, memory_of, stir

from remanence.tokens import MemoryViT


def family(kind="ViTModel"):
    """A graph of parents with different M, a task without memory, one with memory at the input only, one after the norm."""
    memory = MemoryViT(backbone(kind))
    memory.add_task("a", [0, 1], tokens=4)
    memory.add_task("b", [5], tokens=1, parents=["a"])
    memory.add_task("c", [2, 3, 4], tokens=2, norm="post")
    memory.add_task("d", [6, 7], mode="class", parents=["c"])
    memory.add_task("e", [8, 9], tokens=3, mode="input", parents=["b", "d"], init="normal")
    for name in memory.tasks:
        stir(memory, name)
    return memory


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "Dinov2Model"])
def test_side_stream_equals_the_masked_sequence_in_value_and_gradient(kind):
    memory, pixels = family(kind), images(5)
    targets = {name: torch.arange(5) % len(memory.task(name).classes) for name in memory.tasks}

    def value_and_gradients(logits):
        memory.zero_grad()
        sum(F.cross_entropy(logits[name], targets[name]) + logits[name].square().mean() for name in memory.tasks).backward()
        gradients = {name: p.grad.clone() for name, p in memory.named_parameters() if p.grad is not None}
        return {name: value.detach() for name, value in logits.items()}, gradients

    ours, our_gradients = value_and_gradients(memory(pixels).logits)
    plain, plain_gradients = value_and_gradients(masked_sequence(memory, pixels)[0])
    for name in memory.tasks:
        assert (ours[name] - plain[name]).abs().max() < 1e-5
        assert ours[name].std() > 1e-2, "an answer that says nothing proves nothing"
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in our_gradients.items():
        assert (gradient - plain_gradients[name]).abs().max() < 1e-5 * max(1, plain_gradients[name].abs().max()), name
    kinds = {name.rsplit(".", 1)[-1] for name, gradient in our_gradients.items() if gradient.abs().sum() > 0}
    assert kinds == {"memory", "class_token", "weight", "bias"}


def test_each_task_alone_equals_all_in_one_pass():
    memory, pixels = family(), images(3)
    together = memory(pixels).logits
    for name in memory.tasks:
        assert (memory(pixels, [name]).logits[name] - together[name]).abs().max() < 1e-5


def test_the_mask_of_two_tasks_is_table_1():
    memory = memory_of(backbone(), "first", tokens=1)
    memory.add_task("second", [2], tokens=1, parents=["first"])
    memory.add_task("third", [3], tokens=1)
    table = allowed(memory, 2, [1, 1, 1]).int().tolist()
    #        old   C1 C2 C3  M1 M2 M3
    assert table == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 0, 0, 1],
    ]
    lines = memory.mask_table().splitlines()
    assert lines[0].split() == ["backbone", *(word for name in memory.tasks for word in ("C", name, "M", name))]
    assert [line.split() for line in lines[1:]] == [
        ["backbone", "yes", "-", "-", "-", "-", "-", "-"],
        ["first", "yes", "yes", "yes", "-", "-", "-", "-"],
        ["second", "yes", "yes", "yes", "yes", "yes", "-", "-"],
        ["third", "yes", "-", "-", "-", "-", "yes", "yes"],
    ]


def test_a_mask_that_lets_old_tokens_see_new_ones_changes_old_answers():
    memory, pixels = family(), images(4)
    before = memory.model(pixels).last_hidden_state
    assert torch.equal(memory(pixels).base.last_hidden_state, before)
    assert (masked_sequence(memory, pixels)[1] - before).abs().max() < 1e-5
    assert not torch.allclose(masked_sequence(memory, pixels, old_sees_new=True)[1], before, atol=1e-2)


def test_memories_joined_without_the_mask_disturb_the_first_task():
    memory, pixels = memory_of(backbone(), "first"), images(16)
    alone = memory(pixels).logits["first"].detach()
    for name in ("second", "third"):
        memory.add_task(name, [5], tokens=3)
        stir(memory, name)
    assert (memory(pixels).logits["first"] - alone).abs().max() < 1e-5
    naive = masked_sequence(memory, pixels, everyone=True)[0]["first"]
    assert (naive - alone).abs().max() > 0.05


def test_a_parent_that_reads_the_backbones_own_class_token_has_none_to_be_read():
    memory, pixels = MemoryViT(backbone()), images(3)
    memory.add_task("plain", [0, 1], mode="head")
    memory.add_task("child", [2, 3], tokens=2, parents=["plain"])
    memory.add_task("orphan", [2, 3], tokens=2)
    for name in memory.tasks:
        stir(memory, name)
    memory.task("orphan").load_state_dict(memory.task("child").state_dict())
    logits = memory(pixels).logits
    assert (logits["child"] - logits["orphan"]).abs().max() < 1e-5
    wanted = memory.task("plain").head(memory.model(pixels).last_hidden_state[:, 0])
    assert (logits["plain"] - wanted).abs().max() < 1e-5
