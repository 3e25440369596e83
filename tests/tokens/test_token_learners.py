"""Memory tokens and deep prompts as learners: routers, extension, the backbone's old answers, export."""

import pytest
import torch

from remanence.artifact import materialise
from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.learner import fit
from remanence.parts import PretrainedViT
from remanence.parts.per_task import PerTaskLearner
from remanence.state import states_equal
from remanence.streams import digits, part, split_classes
from remanence.testing import check_learner, tiny_tasks
from remanence.tokens import MemoryTokens, VPTDeep

FEW = {"epochs": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def digit_backbone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMANENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return materialise(PretrainedViT(part(digits(), "pretrain"), width=16, depth=2, heads=2, epochs=6))


@pytest.fixture(scope="module")
def digit_tasks():
    return [event.task for event in split_classes(part(digits(), "stream"), per_task=2, order_seed=0)]


@pytest.mark.parametrize(("mode", "router"), [("memory", "oracle"), ("head", "energy")])
def test_pairs_that_the_shared_suite_leaves_out_keep_the_contract(mode, router, tiny_vit):
    check_learner(lambda seed: MemoryTokens(tiny_vit, tokens=2, mode=mode, router=router, seed=seed, **FEW), exact_forget=True)


def test_extension_keeps_the_contract(tiny_vit):
    check_learner(lambda seed: MemoryTokens(tiny_vit, tokens=2, extend=True, seed=seed, **FEW))


def test_under_extension_the_last_task_goes_first(tiny_vit):
    first, second, third = tiny_tasks(3)
    learner, never = (MemoryTokens(tiny_vit, tokens=2, extend=True, **FEW) for _ in range(2))
    for task in (first, second, third):
        fit(learner, task)
    assert learner.memory.task(third.name).parents == (first.name, second.name)
    before = learner.state_dict()
    steps = learner.forget(first)
    with pytest.raises(ErasureNotSupported, match=rf"'{first.name}' is read by \['{second.name}', '{third.name}'\].*the last one first"):
        next(steps, None)
    assert states_equal(before, learner.state_dict())
    fit(learner, third, "forget")
    fit(never, first), fit(never, second)
    assert states_equal(never.state_dict(), learner.state_dict())
    fit(learner, second, "forget")
    fit(learner, first, "forget")
    assert learner.memory.tasks == []
    never.load_state_dict(learner.state_dict())
    assert never.memory.tasks == []


@pytest.mark.parametrize("kind", [MemoryTokens, VPTDeep])
def test_what_the_backbone_knew_is_answered_bit_for_bit_as_before(kind, digit_backbone, digit_tasks):
    learner = kind(digit_backbone, tokens=2, epochs=1)
    inputs = digit_tasks[0].test.inputs
    old_name = learner.host.name
    before = learner.predict(inputs, old_name)
    assert before.logits.shape == (len(inputs), len(learner.host.classes))
    weights = {name: value.clone() for name, value in learner.host.state_dict().items()}
    for task in digit_tasks[:2]:
        fit(learner, task)
    fit(learner, digit_tasks[0], "forget")
    after = learner.predict(inputs, old_name)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.classes, after.classes)
    assert all(torch.equal(weights[name], value) for name, value in learner.host.state_dict().items())


@pytest.mark.parametrize("kind", [MemoryTokens, VPTDeep])
def test_a_task_is_learned_and_stays_while_others_come(kind, digit_backbone, digit_tasks):
    learner = kind(digit_backbone, tokens=3, epochs=10, batch_size=16)
    first, second = digit_tasks[:2]

    def accuracy(task):
        return (learner.predict(task.test.inputs, task.name).labels() == task.test.targets).float().mean().item()

    fit(learner, first)
    answers, score = learner.predict(first.test.inputs, first.name).logits, accuracy(first)
    assert score > 0.7
    fit(learner, second)
    assert torch.equal(learner.predict(first.test.inputs, first.name).logits, answers)
    assert accuracy(second) > 0.6


def test_predictions_between_steps_follow_the_steps(tiny_vit):
    task = tiny_tasks(1)[0]
    learner = MemoryTokens(tiny_vit, tokens=2, lr=0.1, **FEW)
    seen = []
    for _ in learner.learn(task):
        seen.append(learner.predict(task.test.inputs, task.name).logits)
        twin = MemoryTokens(tiny_vit, tokens=2, lr=0.1, **FEW)
        twin.load_state_dict(learner.state_dict())
        assert torch.allclose(seen[-1], twin.predict(task.test.inputs, task.name).logits, atol=1e-6)
    assert len(seen) == 3
    assert not torch.allclose(seen[0], seen[2])


@pytest.mark.parametrize("router", ["prototype", "energy", "confidence"])
def test_a_router_chooses_by_what_it_says(router, digit_backbone, digit_tasks):
    first, second = digit_tasks[:2]
    learner = MemoryTokens(digit_backbone, tokens=2, router=router, epochs=5, batch_size=16)
    fit(learner, first), fit(learner, second)
    inputs = torch.cat([first.test.inputs, second.test.inputs])
    logits = [learner.predict(inputs, task.name).logits for task in (first, second)]
    if router == "prototype":
        features = learner.host(inputs)
        distances = []
        for task in (first, second):
            own = learner.host(task.train.inputs)
            means = torch.stack([own[task.train.targets == label].mean(0) for label in task.classes])
            distances.append(-torch.cdist(features, means).amin(1))
        scores = torch.stack(distances, 1)
    elif router == "energy":
        scores = torch.stack([part.exp().sum(1).log() for part in logits], 1)
    else:
        scores = torch.stack([part.softmax(1).amax(1) for part in logits], 1)
    chosen = scores.argmax(1)
    assert 0 < chosen.sum() < len(chosen), "a router that never chooses otherwise proves nothing"
    answer = learner.predict(inputs)
    assert answer.classes.tolist() == sorted([*first.classes, *second.classes])
    wanted = [
        learner.memory.task((first, second)[task].name).classes[logits[task][row].argmax()] for row, task in enumerate(chosen.tolist())
    ]
    assert answer.labels().tolist() == wanted
    fit(learner, second, "forget")
    assert set(learner.predict(inputs).labels().tolist()) <= set(first.classes)


@pytest.mark.parametrize("kind", [MemoryTokens, VPTDeep])
def test_by_name_a_task_answers_alone_and_the_oracle_needs_the_name(kind, tiny_vit):
    first, second = tiny_tasks(2)
    learner = kind(tiny_vit, tokens=2, router="oracle", **FEW)
    assert learner.needs_task_id
    fit(learner, first), fit(learner, second)
    for task in (first, second):
        assert learner.predict(task.test.inputs, task.name).classes.tolist() == sorted(task.classes)
    with pytest.raises(SettingError, match="router: oracle must be told the task's name"):
        learner.predict(first.test.inputs)


def test_the_cache_changes_nothing(tiny_vit):
    task = tiny_tasks(1)[0]
    states = []
    for cache_bytes in (0, 1e9):
        learner = MemoryTokens(tiny_vit, tokens=2, cache_bytes=cache_bytes, epochs=3, batch_size=4)
        fit(learner, task)
        assert (learner._cache[1] is None) == (cache_bytes == 0)
        states.append(learner.memory.task(task.name).state_dict())
    assert all((states[0][key] - states[1][key]).abs().max() < 1e-4 for key in states[0])


def test_learning_a_task_again_with_more_classes_grows_its_head(tiny_vit):
    first, second = tiny_tasks(2)
    more = type(first)(first.name, second.train, second.test)
    learner = MemoryTokens(tiny_vit, tokens=2, **FEW)
    fit(learner, first)
    fit(learner, more)
    assert learner.predict(first.test.inputs, first.name).classes.tolist() == [*first.classes, *second.classes]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda vit: MemoryTokens(vit, tokens=-1), "tokens=-1 must lie in 0"),
        (lambda vit: MemoryTokens(vit, mode="deep"), "mode='deep' is unknown"),
        (lambda vit: MemoryTokens(vit, router="nearest"), "router='nearest' is unknown; give one of prototype, energy"),
        (lambda vit: MemoryTokens(vit, epochs=0), "epochs=0 must be above 0"),
        (lambda vit: VPTDeep(vit, tokens=0), "VPTDeep: tokens=0 must be above 0"),
    ],
)
def test_wrong_settings_are_refused_before_any_training(make, message, tiny_vit):
    with pytest.raises(SettingError, match=message):
        make(tiny_vit)


def test_export_of_a_task_is_a_copy_on_raw_pixels(digit_backbone, digit_tasks):
    learner = MemoryTokens(digit_backbone, tokens=2, epochs=1)
    with pytest.raises(DataError, match="nothing learned yet"):
        learner.export()
    fit(learner, digit_tasks[0]), fit(learner, digit_tasks[1])
    inputs = digit_tasks[0].test.inputs[:9]
    wanted = learner.predict(inputs, digit_tasks[0].name).logits
    reader = learner.export(digit_tasks[0].name)
    fit(learner, digit_tasks[0], "forget")
    assert torch.allclose(reader(inputs), wanted, atol=1e-5)
    with pytest.raises(DataError, match="name the task to export"):
        learner.export("unknown")
    assert isinstance(learner, PerTaskLearner)
