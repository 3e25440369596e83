"""LoRA: tasks never share a trained number."""

import pytest
import torch

from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.learner import fit
from remanence.task import Data, Task, concatenate
from remanence.testing import state_difference
from remanence.weights import LoRA


def learner_of(vit, *tasks, **settings):
    learner = LoRA(vit, **({"rank": 2, "epochs": 2, "batch_size": 4} | settings))
    for task in tasks:
        fit(learner, task)
    return learner


def adapter_of(learner, task):
    return {name: value.clone() for name, value in learner.state_dict()["tasks"][task.name]["tensors"]["adapter"].items()}


@pytest.mark.parametrize("router", ["prototype", "oracle"])
def test_every_adapter_is_trained_whatever_came_before(tiny_vit, tasks, router):
    alone = adapter_of(learner_of(tiny_vit, tasks[1], router=router), tasks[1])
    second = adapter_of(learner_of(tiny_vit, *tasks[:2], router=router), tasks[1])
    assert not state_difference(alone, second)
    assert all(value.abs().sum() > 0 for name, value in second.items() if "lora_B" in name)


def test_being_read_between_steps_leaves_the_adapter_in_use(tiny_vit, tasks):
    read = learner_of(tiny_vit, tasks[0])
    for _ in read.learn(tasks[1]):
        read.predict(tasks[0].test.inputs, tasks[0].name)
        read.predict(tasks[0].test.inputs)
    assert not state_difference(learner_of(tiny_vit, *tasks[:2]).state_dict(), read.state_dict())


def test_other_tasks_stay_bit_identical_when_one_is_learned_or_forgotten(tiny_vit, tasks):
    learner = learner_of(tiny_vit, tasks[0], tasks[1])
    inputs = tasks[0].test.inputs
    before, adapter = learner.predict(inputs, tasks[0].name).logits, adapter_of(learner, tasks[0])
    for task, verb in ((tasks[2], "learn"), (tasks[1], "forget"), (tasks[2], "forget")):
        fit(learner, task, verb)
        assert torch.equal(before, learner.predict(inputs, tasks[0].name).logits)
        assert not state_difference(adapter, adapter_of(learner, tasks[0]))


def test_the_adapters_are_those_of_peft(tiny_vit, tasks):
    from peft.tuners.lora import Linear

    learner = learner_of(tiny_vit, tasks[0])
    adapted = {name.rsplit(".", 1)[-1] for name, module in learner.host.vit.named_modules() if isinstance(module, Linear)}
    assert adapted == {"q_proj", "v_proj"}


def test_the_handed_in_model_and_the_base_weights_stay(tiny_vit, tasks):
    before = {name: value.clone() for name, value in tiny_vit.state_dict().items()}
    learner = learner_of(tiny_vit, *tasks[:2])
    assert list(tiny_vit.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in tiny_vit.state_dict().items())
    base = {name.replace(".base_layer", ""): value for name, value in learner.host.vit.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(value, base[name]) for name, value in before.items())


def test_export_is_a_plain_model_with_the_adapter_merged(tiny_vit, tasks):
    learner = learner_of(tiny_vit, *tasks[:2], epochs=6)
    for task in tasks[:2]:
        module = learner.export(task.name)
        assert not [name for name, _ in module.named_modules() if "lora" in name]
        answer = learner.predict(task.test.inputs, task.name)
        assert torch.allclose(module(task.test.inputs), answer.logits, atol=1e-5)
    plain = learner.host.vit
    learner._activate(None)
    assert not torch.allclose(learner.host(tasks[0].test.inputs), learner.export(tasks[0].name)[0](tasks[0].test.inputs), atol=1e-4)
    assert plain is learner.host.vit
    with pytest.raises(DataError, match=r"name the task to export.*task 0, task 1"):
        learner.export()


def joint(*tasks):
    train, test = concatenate([task.train for task in tasks]), concatenate([task.test for task in tasks])
    return Task("joint", train, test, parts=tuple(tasks))


def test_a_part_of_a_task_cannot_go_out_and_the_refusal_leaves_no_trace(tiny_vit, tasks):
    learner = learner_of(tiny_vit, joint(*tasks[:2]))
    before = learner.state_dict()
    for part in (tasks[0], joint(*tasks[:2]).select(torch.arange(5))):
        with pytest.raises(ErasureNotSupported, match="goes out whole or not at all"):
            fit(learner, part, "forget")
        assert not state_difference(before, learner.state_dict())


def test_a_used_learner_that_loads_a_state_takes_over_its_order(tiny_vit, tasks):
    first, second = learner_of(tiny_vit, tasks[0], tasks[1]), learner_of(tiny_vit, tasks[1], tasks[2], tasks[0])
    second.load_state_dict(first.state_dict())
    assert not state_difference(first.state_dict(), second.state_dict(), ordered=True)
    assert first.footprint() == second.footprint()
    assert torch.equal(first.predict(tasks[0].test.inputs).logits, second.predict(tasks[0].test.inputs).logits)


def test_routing_finds_the_task_by_itself(tiny_vit, tasks):
    learner = learner_of(tiny_vit, *tasks, epochs=1)
    answer = learner.predict(tasks[1].test.inputs)
    assert answer.classes.tolist() == [0, 1, 2, 3, 4, 5]
    assert (answer.logits > -torch.inf).sum(1).tolist() == [2] * 32  # one task's classes are in question for each input
    assert learner.predict(tasks[1].test.inputs, tasks[1].name).classes.tolist() == [2, 3]


def test_errors(tiny_vit, tasks):
    with pytest.raises(SettingError, match=r"match no linear layer.*q_proj"):
        LoRA(tiny_vit, modules=("query",))
    with pytest.raises(SettingError, match="rank=0 must be above 0"):
        LoRA(tiny_vit, rank=0)
    with pytest.raises(SettingError, match="router='guess' is unknown"):
        LoRA(tiny_vit, router="guess")
    with pytest.raises(SettingError, match="must be told the task's name"):
        learner_of(tiny_vit, tasks[0], router="oracle").predict(tasks[0].test.inputs)
    once = Task("once", Data(tasks[0].train.inputs, tasks[0].train.targets, tasks[0].train.ids, one_pass=True), tasks[0].test)
    with pytest.raises(SettingError, match="set epochs: 1"):
        learner_of(tiny_vit).learn(once)
