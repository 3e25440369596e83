"""Learners that train a classifier by gradient steps: what they keep, what they forget, what they refuse."""

import copy
import math

import pytest
import torch

from remanence.errors import DataError, SettingError
from remanence.learner import fit
from remanence.parts import ClassHead, VisionHost
from remanence.streams import digits, part, split_classes
from remanence.task import Data, Task
from remanence.testing import check_learner, state_difference
from remanence.weights import EWC, FineTuning, LinearProbe, LoRA, Replay

GRADIENT = [FineTuning, Replay, EWC, LinearProbe]


def quick(cls, vit, **settings):
    return cls(vit, **({"epochs": 1, "batch_size": 4} | settings))


@pytest.mark.parametrize("cls", [FineTuning, EWC, LoRA])
def test_a_backbone_with_dropout_is_read_without_dropout_and_keeps_the_contract(make_vit, tasks, cls):
    vit = make_vit(hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4).train()
    learner = quick(cls, vit)
    fit(learner, tasks[0])
    first, second = (learner.predict(tasks[0].test.inputs).logits for _ in range(2))
    assert torch.equal(first, second)
    assert vit.training
    check_learner(lambda seed: quick(cls, vit, seed=seed))


def plain_loop(vit, task):
    """What fine-tuning is, by hand."""
    vit, n_steps = copy.deepcopy(vit), 5
    head = ClassHead(16, 0)
    head.grow(task.classes)
    optimizer = torch.optim.AdamW([*vit.parameters(), head.weight, head.bias], weight_decay=0.0, fused=True)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / n_steps))
        rows = task.train.rows(step, 4, 0, "learn", task.name)
        features = vit(pixel_values=(task.train.inputs[rows] - 0.5) / 0.5).last_hidden_state[:, 0]
        loss = torch.nn.functional.cross_entropy(head(features), task.train.targets[rows] - task.classes[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(vit.state_dict()), head.state()


def test_fine_tuning_equals_a_loop_written_by_hand(tiny_vit, tasks):
    learner = quick(FineTuning, tiny_vit, epochs=2, lr=1e-2)
    fit(learner, tasks[1])
    vit, head = plain_loop(tiny_vit, tasks[1])
    state = learner.state_dict()
    for name, value in vit.items():
        torch.testing.assert_close(state["backbone"][name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["head"]["weight"], head["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", GRADIENT)
def test_forgetting_all_that_was_learned_is_exact(tiny_vit, tasks, cls):
    learner = quick(cls, tiny_vit)
    before = quick(cls, tiny_vit).state_dict()
    fit(learner, tasks[0])
    assert state_difference(before, learner.state_dict())
    fit(learner, tasks[0], "forget")
    assert not state_difference(before, learner.state_dict())


def test_retained_examples_may_be_none_at_all(tiny_vit, tasks):
    states = []
    for retain in (None, tasks[1].train.select(torch.arange(0))):
        learner = quick(FineTuning, tiny_vit)
        for task in tasks[:2]:
            fit(learner, task)
        for _ in learner.forget(tasks[0], retain):
            pass
        states.append(learner.state_dict())
    assert not state_difference(*states)


def test_retained_examples_keep_the_rest_right(tiny_vit, tasks):
    loss = {}
    for name, retain in (("none", None), ("some", tasks[1].train)):
        learner = quick(FineTuning, tiny_vit, epochs=10, forget_epochs=10)
        for task in tasks[:2]:
            fit(learner, task)
        for _ in learner.forget(tasks[0], retain):
            pass
        loss[name] = -learner.score(tasks[1].train.inputs, tasks[1].train.targets).mean().item()
    assert loss["some"] < loss["none"]


def test_local_training_leaves_other_heads_alone(tiny_vit, tasks):
    learner = quick(LinearProbe, tiny_vit, local=True)
    fit(learner, tasks[0])
    rows = learner.head.weight.detach()[:2].clone()
    fit(learner, tasks[1])
    assert torch.equal(rows, learner.head.weight.detach()[:2])
    other = quick(LinearProbe, tiny_vit)
    for task in tasks[:2]:
        fit(other, task)
    assert not torch.equal(rows, other.head.weight.detach()[:2])


def test_replay_drops_the_forgotten_examples_from_its_buffer(tiny_vit, tasks):
    learner = quick(Replay, tiny_vit)
    for task in tasks[:2]:
        fit(learner, task)
    assert torch.isin(tasks[0].train.ids, learner.buffer.ids).all()
    fit(learner, tasks[0], "forget")
    assert learner.buffer.ids.tolist() == tasks[1].train.ids.tolist()


def test_the_old_task_is_answered_by_its_own_head(make_vit, tasks):
    host = VisionHost(make_vit(), "old", (70, 71), torch.nn.Linear(16, 2))
    learner = quick(FineTuning, host)
    fit(learner, tasks[0])
    assert learner.predict(tasks[0].test.inputs, "old").classes.tolist() == [70, 71]
    assert learner.predict(tasks[0].test.inputs, tasks[0].name).classes.tolist() == [0, 1]


def test_replay_keeps_more_than_fine_tuning_on_real_digits(make_vit):
    vit = make_vit(hidden_size=32, intermediate_size=64, patch_size=2, num_attention_heads=4)
    stream = split_classes(part(digits(), "stream"), per_task=2)[:3]
    kept = {}
    for cls, settings in ((FineTuning, {}), (Replay, {"budget_bytes": 200 * 272})):
        learner = cls(vit, epochs=5, **settings)
        for event in stream:
            fit(learner, event.task)
        right = [(learner.predict(e.task.test.inputs).labels() == e.task.test.targets).float().mean().item() for e in stream]
        kept[cls] = sum(right) / 3
    assert kept[FineTuning] < 0.45  # it answers the last task only
    assert kept[Replay] > kept[FineTuning] + 0.2


def test_errors(tiny_vit, tasks):
    for name in ("epochs", "batch_size", "lr", "forget_epochs"):
        with pytest.raises(SettingError, match=f"FineTuning: {name}=-1 must be above 0"):
            FineTuning(tiny_vit, **{name: -1})
    with pytest.raises(SettingError, match="replay_size=0 must be above 0"):
        Replay(tiny_vit, replay_size=0)
    with pytest.raises(SettingError, match="budget_bytes=0 holds no example"):
        Replay(tiny_vit, budget_bytes=0)
    with pytest.raises(SettingError, match="below the size of one example"):
        fit(quick(Replay, tiny_vit, budget_bytes=100), tasks[0])
    with pytest.raises(DataError, match="nothing to export"):
        FineTuning(tiny_vit).export()
    once = Data(tasks[0].train.inputs, tasks[0].train.targets, tasks[0].train.ids, one_pass=True)
    with pytest.raises(SettingError, match="may be seen once; set epochs: 1"):
        FineTuning(tiny_vit, epochs=2).learn(Task("once", once, tasks[0].test))
    with pytest.raises(DataError, match="test-only"):
        FineTuning(tiny_vit).learn(Task("bystander", None, tasks[0].test))
    with pytest.raises(SettingError, match=r"answers \('classes',\), task 'words' asks for tokens"):
        FineTuning(tiny_vit).learn(Task("words", tasks[0].train, tasks[0].test, answer="tokens"))
