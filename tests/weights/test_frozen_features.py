"""What learns on frozen features moves nothing else: prototypes, LoRA, linear probe."""

import pytest
import torch
from torch import nn

from remanence.errors import DataError, SettingError
from remanence.learner import fit
from remanence.parts import VisionHost
from remanence.task import Data, Task, concatenate
from remanence.weights import LinearProbe, LoRA, Prototypes

OLD = (70, 71, 72)


@pytest.fixture
def host(make_vit):
    head = nn.Linear(16, 3)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 48).reshape(3, 16))
        head.bias.zero_()
    return VisionHost(make_vit(seed=3), "old", OLD, head)


@pytest.mark.parametrize("build", [Prototypes, lambda host: LoRA(host, epochs=1), lambda host: LinearProbe(host, epochs=1)])
def test_the_old_task_is_answered_as_before(host, tasks, build):
    learner = build(host)
    before = learner.predict(tasks[0].test.inputs, "old")
    assert before.classes.tolist() == list(OLD)
    for task in tasks[:2]:
        fit(learner, task)
    after = learner.predict(tasks[0].test.inputs, "old")
    assert torch.equal(before.logits, after.logits)
    fit(learner, tasks[0], "forget")
    assert torch.equal(before.logits, learner.predict(tasks[0].test.inputs, "old").logits)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_means_do_not_depend_on_order_or_batching(tiny_vit, tasks, metric):
    train = concatenate([task.train for task in tasks])
    orders = [torch.arange(len(train)), torch.arange(len(train)).flip(0), torch.randperm(len(train), generator=torch.manual_seed(0))]
    means = []
    for order in orders:
        for batch_size in (1, 7, 64):
            learner = Prototypes(tiny_vit, metric, batch_size)
            fit(learner, Task("all", train.select(order), tasks[0].test))
            means.append(learner.head.means()[1])
    assert all(torch.allclose(mean, means[0], rtol=0, atol=1e-5) for mean in means)


def test_the_nearest_mean_answers(tiny_vit, tasks):
    learner = Prototypes(tiny_vit)
    fit(learner, tasks[0])
    host, train = learner.host, tasks[0].train
    features = host(train.inputs)
    means = torch.stack([features[train.targets == label].mean(0) for label in (0, 1)])
    wanted = -((host(tasks[0].test.inputs)[:, None] - means[None]) ** 2).sum(-1)
    assert torch.allclose(learner.predict(tasks[0].test.inputs).logits, wanted, atol=1e-4)


def test_a_part_of_a_task_is_subtracted(tiny_vit, tasks):
    whole, part = Prototypes(tiny_vit), Prototypes(tiny_vit)
    fit(whole, tasks[0])
    fit(whole, tasks[0].select(torch.arange(4)), "forget")
    fit(part, tasks[0].select(torch.arange(4, 10)))
    assert torch.allclose(whole.head.means()[1], part.head.means()[1], rtol=0, atol=1e-9)
    fit(whole, tasks[0].select(tasks[0].train.targets == 1).select(torch.arange(1)), "forget")


def test_errors(tiny_vit, tasks):
    with pytest.raises(SettingError, match="metric='manhattan' is unknown"):
        Prototypes(tiny_vit, metric="manhattan")
    with pytest.raises(SettingError, match="batch_size=0 must be above 0"):
        Prototypes(tiny_vit, batch_size=0)
    with pytest.raises(DataError, match="was never learned"):
        fit(Prototypes(tiny_vit), tasks[0], "forget")
    with pytest.raises(DataError, match="nothing to export"):
        Prototypes(tiny_vit).export()
    wide = Task("wide", Data(torch.zeros(2, 1, 9, 9), torch.zeros(2).long(), torch.arange(2)), tasks[0].test)
    with pytest.raises(DataError, match=r"9.*8"):
        Prototypes(tiny_vit).learn(wide)
