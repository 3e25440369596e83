"""EWC: the penalty worked out by hand, and what happens to it when the head grows or a task goes."""

import pytest
import torch
from torch import nn

from remanence.errors import SettingError
from remanence.learner import fit
from remanence.state import all_finite
from remanence.weights import EWC


def learner_of(vit, *tasks, **settings):
    learner = EWC(vit, **({"epochs": 1, "batch_size": 4, "forget_epochs": 1} | settings))
    for task in tasks:
        fit(learner, task)
    return learner


def test_penalty_of_two_parameters_by_hand(tiny_vit, monkeypatch):
    learner = EWC(tiny_vit, strength=3.0)
    values = {"a": nn.Parameter(torch.tensor([2.0])), "b": nn.Parameter(torch.tensor([-1.0, 0.5]))}
    monkeypatch.setattr(learner, "_parameters", lambda: values)
    learner.fisher = {"a": torch.tensor([4.0]), "b": torch.tensor([1.0, 0.0])}
    learner.anchor = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0, 9.0])}
    penalty = learner.penalty()
    assert penalty.item() == pytest.approx(3 / 2 * (4 * 1 + 1 * 4 + 0))
    penalty.backward()
    assert values["a"].grad.tolist() == [3.0 * 4.0 * 1.0]
    assert values["b"].grad.tolist() == [3.0 * 1.0 * -2.0, 0.0]


def test_there_is_no_penalty_before_the_first_task_and_none_at_the_anchor(tiny_vit, tasks):
    assert EWC(tiny_vit).penalty().item() == 0
    assert learner_of(tiny_vit, tasks[0]).penalty().item() == 0


def test_new_head_rows_have_no_fisher(tiny_vit, tasks):
    learner = learner_of(tiny_vit, tasks[0])
    old = learner.fisher["head.weight"].clone()
    assert (old > 0).any()
    learner._grow((2, 3))
    assert torch.equal(learner.fisher["head.weight"][:2], old)
    assert learner.fisher["head.weight"][2:].abs().sum() == 0
    assert torch.equal(learner.anchor["head.weight"][2:], learner.head.weight[2:])
    assert learner.penalty().item() == 0


def test_fisher_is_a_decayed_running_sum(tiny_vit, tasks):
    learner = learner_of(tiny_vit, tasks[0], decay=0.5)
    first = {name: value.clone() for name, value in learner.fisher.items()}
    learner._grow(tasks[1].classes)
    grown = dict(learner.fisher)
    task_fisher = learner._fisher_of(tasks[1], tasks[1].train)
    learner._consolidate(tasks[1], tasks[1].train)
    for name, value in learner.fisher.items():
        assert torch.allclose(value, 0.5 * grown[name] + task_fisher[name])
    assert first


def test_a_strong_penalty_holds_the_weights(tiny_vit, tasks):
    moved = {}
    for strength in (0.0, 1e7):
        learner = learner_of(tiny_vit, tasks[0], strength=strength, epochs=4)
        important = {name: value > value.max() / 100 for name, value in learner.fisher.items() if name.startswith("vit")}
        anchor = dict(learner.anchor)
        fit(learner, tasks[1])
        after = learner._parameters()
        moved[strength] = sum(float((after[name].detach() - anchor[name])[mask].square().sum()) for name, mask in important.items())
    assert moved[1e7] < 0.5 * moved[0.0]


def test_forgetting_takes_rows_of_fisher_and_anchor_along(tiny_vit, tasks):
    learner = learner_of(tiny_vit, *tasks)
    fit(learner, tasks[1], "forget")
    assert learner.head.classes == [0, 1, 4, 5]
    assert {len(part["head.weight"]) for part in (learner.fisher, learner.anchor)} == {4}
    assert all(value.min() >= 0 for value in learner.fisher.values())
    for task in (tasks[0], tasks[2]):
        fit(learner, task, "forget")
    assert learner.fisher == {}
    assert learner.penalty().item() == 0


def test_forgetting_no_example_leaves_a_finite_state(tiny_vit, tasks):
    learner = learner_of(tiny_vit, *tasks[:2])
    fit(learner, tasks[0].select(torch.arange(0)), "forget")
    assert all_finite(learner.state_dict())
    assert learner.head.classes == [0, 1, 2, 3]


def test_errors(tiny_vit):
    with pytest.raises(SettingError, match=r"strength=-1.*decay=1"):
        EWC(tiny_vit, strength=-1)
    with pytest.raises(SettingError, match=r"decay=0 in \(0, 1\]"):
        EWC(tiny_vit, decay=0)


def test_what_is_taken_out_of_fisher_is_decayed_by_the_tasks_that_came_since(tiny_vit, tasks, monkeypatch):
    for index, share in ((0, 0.25), (1, 0.5), (2, 1.0)):
        learner = learner_of(tiny_vit, *tasks, decay=0.5)
        learner.fisher = {name: torch.full_like(value, 10.0) for name, value in learner.fisher.items()}
        ones = {name: torch.ones_like(value) for name, value in learner.fisher.items()}
        monkeypatch.setattr(learner, "_fisher_of", lambda task, data, ones=ones: ones)
        learner._drop(tasks[index], tasks[index].train)
        assert {value.unique().item() for value in learner.fisher.values()} == {10 - share}
