"""The traps of generators as learners, each one with its own test, for all learners that ship."""

from collections.abc import Sequence

import pytest
import torch

from remanence.errors import DataError
from remanence.learner import STOP, Cursor, fit
from remanence.parts import run_verb
from remanence.parts.optimizer_state import load_moments, moments
from remanence.probe import View
from remanence.state import copy_state, load_state, save_state, states_equal

NAMES = ["fine-tuning", "fine-tuning local", "replay", "EWC", "LoRA prototype", "LoRA oracle", "prototypes", "linear probe"]
every = pytest.mark.parametrize("name", NAMES)


@every
def test_no_context_manager_is_open_across_a_yield(name, makers, tasks):
    learner = makers[name]()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for task, verb in ((tasks[0], "learn"), (tasks[1], "learn"), (tasks[0], "forget")):
                before = torch.default_generator.get_state()
                for _ in learner.learn(task) if verb == "learn" else learner.forget(task):
                    assert torch.is_grad_enabled() == grad
                    assert torch.equal(torch.default_generator.get_state(), before)
        assert torch.is_grad_enabled()


@every
def test_learn_and_forget_check_at_the_call(name, makers, tasks):
    learner = makers[name]()
    wrong = tasks[0].__class__("bystander", None, tasks[0].test)
    with pytest.raises(DataError, match="test-only"):
        learner.learn(wrong)
    with pytest.raises(DataError, match="test-only"):
        learner.forget(wrong)


@every
def test_opening_alone_does_nothing(name, makers, tasks):
    learner = makers[name]()
    before = copy_state(learner.state_dict())
    learner.learn(tasks[0]).close()
    assert states_equal(before, learner.state_dict())


@every
def test_closing_abandons_and_the_verb_can_be_taken_up_again(name, makers, tasks):
    learner, whole = makers[name](), makers[name]()
    fit(whole, tasks[0])
    steps = learner.learn(tasks[0])
    next(steps)
    steps.close()
    assert learner.cursor.step == 1
    assert tasks[0].name not in learner.book
    fit(learner, tasks[0])
    assert states_equal(learner.state_dict(), whole.state_dict())


@every
def test_stop_consolidates(name, makers, tasks):
    learner = makers[name]()
    steps = learner.learn(tasks[0])
    next(steps)
    with pytest.raises(StopIteration):
        steps.send(STOP)
    assert learner.book.names() == [tasks[0].name]
    assert learner.cursor == Cursor()


def test_close_does_not_run_the_end_and_stop_does():
    done = []
    job = ("learn", "t", 5)
    for how in ("close", "stop", "crash"):
        cursor = Cursor()
        begin = lambda how=how: done.append(f"begin {how}")  # noqa: E731
        step = lambda k, how=how: (None, 1 // (0 if how == "crash" and k else 1))  # noqa: E731
        end = lambda how=how: done.append(f"end {how}")  # noqa: E731
        steps = run_verb(cursor, job, begin, step, end)
        next(steps)
        if how == "close":
            steps.close()
        elif how == "stop":
            with pytest.raises(StopIteration):
                steps.send(STOP)
        else:
            with pytest.raises(ZeroDivisionError):
                next(steps)
        assert cursor.step == (0 if how == "stop" else 1)
    assert done == ["begin close", "begin stop", "end stop", "begin crash"]


def test_another_verb_begins_anew():
    cursor = Cursor()
    assert cursor.begin("learn", "a") == 0
    cursor.step = 3
    assert cursor.begin("learn", "a") == 3
    assert cursor.begin("forget", "a") == 0
    cursor.step = 1
    assert cursor.begin("forget", "b") == 0


def quadratic(seed):
    parameters = [torch.nn.Parameter(torch.rand(3, generator=torch.Generator().manual_seed(seed))), torch.nn.Parameter(torch.zeros(2))]
    return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=True)


def descend(parameters, optimizer, n):
    for _ in range(n):
        optimizer.zero_grad()
        sum((parameter - 1).square().sum() for parameter in parameters).backward()
        optimizer.step()


def test_moments_are_copied_never_shared():
    first, optimizer = quadratic(0)
    descend(first, optimizer, 3)
    saved = moments(optimizer)
    second, twin = quadratic(0)
    with torch.no_grad():
        for ours, theirs in zip(second, first, strict=True):
            ours.copy_(theirs)
    load_moments(twin, saved)
    before = copy_state(saved)
    descend(second, twin, 2)
    assert states_equal(before, moments(optimizer))
    descend(first, optimizer, 2)
    assert states_equal([p.detach() for p in first], [p.detach() for p in second])
    assert states_equal(moments(optimizer), moments(twin))


def test_moments_of_another_number_of_parameters_are_refused():
    _, optimizer = quadratic(0)
    with pytest.raises(ValueError, match="moments for 1 parameters, the optimizer trains 2"):
        load_moments(optimizer, [{}])


@every
def test_a_fork_in_the_middle_of_a_task_leaves_the_original_alone(name, makers, tasks):
    learner, whole = makers[name](), makers[name]()
    fit(whole, tasks[0])
    steps = learner.learn(tasks[0])
    next(steps)
    before = copy_state(learner.state_dict())
    fork = View(learner, (), 0, "learn", (tasks[0],), makers[name]).fork()
    fit(fork, tasks[0])
    fit(fork, tasks[1])
    assert states_equal(before, learner.state_dict())
    for _ in steps:
        pass
    assert states_equal(whole.state_dict(), learner.state_dict())


@every
def test_every_state_on_the_way_can_be_saved(name, makers, tasks, tmp_path):
    # safetensors itself refuses shared and non-contiguous tensors
    learner = makers[name]()
    for task, verb in ((tasks[0], "learn"), (tasks[1], "learn"), (tasks[0], "forget")):
        for _ in learner.learn(task) if verb == "learn" else learner.forget(task):
            save_state(tmp_path / "state", learner.state_dict())
            assert states_equal(load_state(tmp_path / "state"), learner.state_dict())


@every
def test_seeds_are_keyed_by_verb_task_and_step(name, makers, tasks):
    learner = makers[name](0)
    fit(learner, tasks[0])
    torch.manual_seed(5)
    torch.rand(100)
    other = makers[name](0)
    fit(other, tasks[0])
    assert states_equal(learner.state_dict(), other.state_dict())
    if not name.startswith("prototypes"):
        another = makers[name](1)
        fit(another, tasks[0])
        assert not states_equal(learner.state_dict(), another.state_dict())


def test_a_stream_is_a_sequence(tasks):
    from list_stream import ListStream

    assert isinstance(ListStream(("learn", tasks[0])), Sequence)
