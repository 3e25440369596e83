"""check_learner rejects a learner that breaks one rule: a test that cannot fail is no test."""

import random

import numpy as np
import pytest
import torch
from toy_learner import Toy

from remanence.errors import ErasureNotSupported
from remanence.learner import STOP, Footprint, Prediction, Progress, require_learnable
from remanence.testing import check_learner

BROKEN = []


def breaks(promise):
    def register(cls):
        BROKEN.append(pytest.param(cls, promise, id=cls.__name__))
        return cls

    return register


def test_the_toy_itself_keeps_the_contract():
    state = torch.default_generator.get_state()
    check_learner(Toy, exact_forget=True)
    assert torch.equal(state, torch.default_generator.get_state())


@breaks("names at least one read-out.*It is \\(\\)")
class NoReader(Toy):
    readers = ()


@breaks("names at least one read-out.*each once")
class TwinReaders(Toy):
    readers = ("", "")


@breaks("refuses a task without a train set when called")
class ChecksLate(Toy):
    def learn(self, task):
        yield from self._learn(task, require_learnable(self, task))


@breaks("Progress counts 1, 2, 3")
class CountsFromZero(Toy):
    def _learn(self, task, data):
        for progress in super()._learn(task, data):
            yield Progress(progress.step - 1, progress.steps, progress.loss, progress.n_examples)


@breaks("announced")
class AnnouncesTooMany(Toy):
    def _learn(self, task, data):
        for progress in super()._learn(task, data):
            yield Progress(progress.step, 99, progress.loss, progress.n_examples)


@breaks("carry a graph; yield loss.detach")
class LossWithGraph(Toy):
    def _learn(self, task, data):
        for progress in super()._learn(task, data):
            yield Progress(progress.step, progress.steps, torch.ones((), requires_grad=True) * 2, progress.n_examples)


@breaks("predict.*The logits carry a graph")
class PredictWithGraph(Toy):
    def predict(self, inputs, task=None, reader=""):
        answer = super().predict(inputs, task, reader)
        return Prediction(answer.logits * torch.ones((), requires_grad=True), answer.classes)


@breaks("predict.*one by one differ")
class BatchStatistics(Toy):
    def predict(self, inputs, task=None, reader=""):
        answer = super().predict(inputs, task, reader)
        return Prediction(answer.logits - (answer.logits.mean(0) if len(inputs) else 0), answer.classes)


@breaks("predict.*Instead it raised")
class NoEmptyBatch(Toy):
    def predict(self, inputs, task=None, reader=""):
        inputs.max()
        return super().predict(inputs, task, reader)


@breaks("predict.*inputs gave logits")
class WrongShape(Toy):
    def predict(self, inputs, task=None, reader=""):
        answer = super().predict(inputs, task, reader)
        return Prediction(answer.logits.T, answer.classes)


@breaks("leave no trace")
class CountsReaders(Toy):
    n_read = 0

    def predict(self, inputs, task=None, reader=""):
        self.n_read += 1
        return super().predict(inputs, task, reader)

    def state_dict(self):
        return super().state_dict() | {"n_read": self.n_read}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.n_read = state["n_read"]


@breaks("being read at every step changed the result")
class ReadingSwitchesOff(Toy):
    is_off = False

    def predict(self, inputs, task=None, reader=""):
        self.is_off = bool(self.tables)
        return super().predict(inputs, task, reader)

    def step(self, task, data, step):
        return 0 if self.is_off else super().step(task, data, step)


@breaks("`score` is the log-probability")
class ScoresShares(Toy):
    def score(self, inputs, targets, task=None, reader=""):
        return super().score(inputs, targets, task, reader).exp()


@breaks("Two learners of one seed end in one state")
class DrawsFromTheWorld(Toy):
    def step(self, task, data, step):
        self.velocity = self.velocity + np.random.default_rng().random()
        return super().step(task, data, step)


@breaks("Two learners of one seed end in one state")
class DrawsFromTheGlobalGenerator(Toy):
    def step(self, task, data, step):
        self.velocity = self.velocity + torch.rand(())
        return super().step(task, data, step)


@breaks("changed torch's global generator")
class WastesTorch(Toy):
    def step(self, task, data, step):
        torch.rand(1)
        return super().step(task, data, step)


@breaks("changed random's global generator")
class SeedsRandom(Toy):
    def _learn(self, task, data):
        random.seed(0)
        yield from super()._learn(task, data)


@breaks("predict changed numpy's global generator")
class PredictWastesNumpy(Toy):
    def predict(self, inputs, task=None, reader=""):
        np.random.random()  # noqa: NPY002 - the fault to be found
        return super().predict(inputs, task, reader)


@breaks("gradients are off at a yield")
class OpenContext(Toy):
    def _learn(self, task, data):
        with torch.no_grad():
            yield from super()._learn(task, data)


@breaks("tasks' tensors stay as they are")
class WritesIntoInputs(Toy):
    def step(self, task, data, step):
        data.inputs.clamp_(max=0.7)
        return super().step(task, data, step)


@breaks("tasks' tensors stay as they are")
class PredictWritesIntoInputs(Toy):
    def predict(self, inputs, task=None, reader=""):
        inputs.clamp_(max=0.7)
        return super().predict(inputs, task, reader)


@breaks("loaded state differs")
class AddsToWhatItKnew(Toy):
    def load_state_dict(self, state):
        before = self.tables
        super().load_state_dict(state)
        self.tables = before | self.tables


@breaks("save_state.*Instead it raised TypeError.*not a string")
class NumbersAsKeys(Toy):
    def state_dict(self):
        return super().state_dict() | {"seen": {0: 1}}


@breaks("the answers differ")
class KeepsPartOfItself(Toy):
    bias = 0.0

    def step(self, task, data, step):
        self.bias += 0.25
        return super().step(task, data, step)

    def predict(self, inputs, task=None, reader=""):
        answer = super().predict(inputs, task, reader)
        return Prediction(answer.logits + self.bias, answer.classes)


@breaks("Closed at any yield.*took the steps \\[1, 2.*keep a Cursor")
class NoCursor(Toy):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.cursor.close()

    def state_dict(self):
        return super().state_dict() | {"cursor": {"verb": "", "task": "", "step": 0}}


@breaks("Closed at any yield.*resumed after step 1 of 5: state.tables")
class LocalMomentum(Toy):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.velocity is not None:
            self.velocity = torch.zeros_like(self.velocity)


@breaks("Closing the generator abandons")
class ConsolidatesInFinally(Toy):
    def _learn(self, task, data):
        try:
            yield from super()._learn(task, data)
        finally:
            self.velocity = None


@breaks("it went on after STOP")
class DeafToStop(Toy):
    def _learn(self, task, data):
        for progress in super()._learn(task, data):
            _ = yield progress


@breaks("after STOP the next verb did not begin at step 1")
class LeavesTheCursorOpen(Toy):
    def _learn(self, task, data):
        for progress in super()._learn(task, data):
            if (yield progress) == STOP:
                return


@breaks("`load_state_dict` copies")
class SharesMemory(Toy):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.velocity = state["velocity"]

    def step(self, task, data, step):
        before = self.velocity
        n_examples = super().step(task, data, step)
        self.velocity = before.copy_(self.velocity)
        return n_examples


@breaks("An empty train set takes no step.*Instead it raised")
class NeedsData(Toy):
    def _learn(self, task, data):
        data.rows(0, 1)
        yield from super()._learn(task, data)


@breaks("An empty train set.*answers about another task changed")
class EmptyWipes(Toy):
    def _learn(self, task, data):
        if not len(data):
            self.tables = {}
        yield from super()._learn(task, data)


@breaks("A task of one example is learned.*Instead it raised")
class NeedsTwo(Toy):
    def step(self, task, data, step):
        if len(data) == 1:
            raise ZeroDivisionError("n - 1")
        return super().step(task, data, step)


@breaks("may come again.*A class stands twice")
class RepeatsClasses(Toy):
    def predict(self, inputs, task=None, reader=""):
        tables = list(self.tables.values())
        logits = [inputs.flatten(1) @ table["weight"].T for table in tables]
        labels = [label for table in tables for label in table["labels"]]
        return Prediction(torch.cat([inputs.new_zeros(len(inputs), 0), *logits], 1), torch.tensor(labels, dtype=torch.int64))

    export = None


@breaks("It still answers \\[0, 1\\] to images of 'task 0'")
class ForgetsNothing(Toy):
    def _forget(self, name):
        return iter(())


@breaks("It is not as if never learned: state.n_forgotten is 0 here and 1 there")
class LeavesATrace(Toy):
    n_forgotten = 0

    def _forget(self, name):
        yield from super()._forget(name)
        self.n_forgotten += 1

    def state_dict(self):
        return super().state_dict() | {"n_forgotten": self.n_forgotten}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.n_forgotten = state["n_forgotten"]


@breaks("It is not as if never learned: state.order has the keys")
class RemembersTheOrder(Toy):
    def state_dict(self):
        order = {"b": 1, "a": 1} if "task 0" in self.tables or getattr(self, "had", False) else {"a": 1, "b": 1}
        return super().state_dict() | {"order": order}

    def _forget(self, name):
        yield from super()._forget(name)
        self.had = True


@breaks("said to forget exactly, and refused")
class Refuses(Toy):
    def forget(self, task, retain=None):
        raise ErasureNotSupported("never")


@breaks("It refused, but changed the state")
class RefusesTooLate(Toy):
    def forget(self, task, retain=None):
        self.tables = {}
        raise ErasureNotSupported("never")


@breaks("what was never learned raises a RemanenceError.*It raised nothing")
class ForgetsTheUnknown(Toy):
    def forget(self, task, retain=None):
        return super().forget(task) if task.name in self.tables else iter(())


@breaks("footprint.*it says 7 bytes")
class LiesAboutItsSize(Toy):
    def footprint(self):
        return Footprint(7)


@breaks("task_bytes names")
class ForgetsToListATask(Toy):
    def footprint(self):
        sizes = super().footprint().task_bytes
        return Footprint(0, {"all": sum(sizes.values())} if sizes else {})


@breaks("export.*answers otherwise than predict")
class ExportsAnother(Toy):
    def export(self, task=None):
        module = super().export(task)
        module[1].weight.mul_(1.01)
        return module


@breaks("Writing into the exported module changed the learner")
class ExportsItself(Toy):
    def export(self, task=None):
        module = super().export(task)
        module[1].weight = torch.nn.Parameter(self.tables[task]["weight"], requires_grad=False)
        return module


@pytest.mark.parametrize(("cls", "promise"), BROKEN)
def test_a_broken_learner_is_rejected_by_name(cls, promise):
    exact = cls is not RefusesTooLate
    with pytest.raises(AssertionError, match=f"(?s)broken rule.*{promise}"):
        check_learner(cls, exact_forget=exact)


@pytest.mark.parametrize("cls", [Refuses, LeavesATrace, RemembersTheOrder])
def test_what_was_not_claimed_is_not_demanded(cls):
    check_learner(cls)


def test_a_learner_that_draws_nothing_needs_no_seed(makers):
    check_learner(lambda seed: makers["prototypes"](0), exact_forget=True)
