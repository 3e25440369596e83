"""The one protocol of all stores: a learner turns data into state.

`learn` is a generator that yields after each step, so the caller owns the loop: progress bars, probes every k steps,
early stop, checkpoints and resume need neither callbacks nor a trainer class. Rules that make this safe:

- `learn` and `forget` check their task when called and return an inner generator.
- No local variable outlives a `yield`; what must, goes into the state (see `Cursor`).
- No context manager stays open across a `yield`.
- `generator.close()` abandons; `generator.send(STOP)` ends early and consolidates.

Axes: B batch, C classes, N examples.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.state import State, state_bytes
from remanence.task import Data, Task, Verb

STOP = "stop"
"""Sent into a running generator to end it early, with consolidation."""


@dataclass(frozen=True)
class Progress:
    """What a step did.

    Args:
        step: counted from 1: how many steps are done.
        steps: how many there will be, where that is known.
        loss: detached; a tensor is read lazily, so that no step waits for the device.
        n_examples: how many examples this step processed, replayed ones included.
    """

    step: int
    steps: int | None
    loss: Tensor | float | None
    n_examples: int


@dataclass(frozen=True)
class Prediction:
    """Answers: `logits` (B, C) and the C source labels that their columns stand for.

    C is 0 while nothing was learned.
    """

    logits: Tensor
    classes: Tensor

    def labels(self) -> Tensor:
        """(B,) the most likely source label; -1 where there are no classes yet."""
        if len(self.classes) == 0:
            return torch.full((len(self.logits),), -1, dtype=torch.int64, device=self.logits.device)
        return self.classes[self.logits.argmax(-1)]


@dataclass(frozen=True)
class Footprint:
    """What the knowledge costs to hold, beyond the artifacts that a learner only reads.

    Args:
        shared_bytes: state that all tasks share.
        task_bytes: state that belongs to one task alone and goes when it is forgotten.
        trainable_parameters: how many numbers a training step changes.
    """

    shared_bytes: int
    task_bytes: dict[str, int] = field(default_factory=dict)
    trainable_parameters: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes of state; equals the tensors of `state_dict()` at rest."""
        return self.shared_bytes + sum(self.task_bytes.values())


Steps = Generator[Progress, str | None, None]


class Learner(ABC):
    """A mechanism that can be written to, read, asked to forget, saved and copied.

    A subclass takes its settings and a `seed` in `__init__` and draws every random choice from
    `remanence.keys.generator(self.seed, verb, task.name, step)`.

    Attributes:
        store: where the knowledge lives: weights, tokens, generated, context, wiring or peers.
        answers: the kinds of answer it can give.
        needs_task_id: it can answer only when told the task's name.
        n_parallel: how many independent tasks `learn_many` takes at once.
        readers: names of its read-outs; the first is the headline.
    """

    store: ClassVar[str]
    answers: ClassVar[tuple[str, ...]] = ("classes",)
    needs_task_id: bool = False
    n_parallel: int = 1
    readers: tuple[str, ...] = ("",)

    @abstractmethod
    def learn(self, task: Task) -> Steps:
        """Learn a task's train set, one `Progress` a step; going on where the state's cursor stands."""

    @abstractmethod
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        """Answer inputs (B, ...).

        Args:
            inputs: as in `Data.inputs`.
            task: the task's name where the stream tells it; then only that task's classes are in question.
            reader: one of `readers`.
        """

    @abstractmethod
    def state_dict(self) -> State:
        """All that was learned, valid at every yield; may share memory with the learner."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Become the learner that `state` was taken from; copies, so that the two never share memory."""

    def learn_many(self, tasks: Sequence[Task]) -> Steps:
        """Learn up to `n_parallel` independent tasks at once; by default exactly one."""
        if len(tasks) != 1:
            raise SettingError(f"{type(self).__name__} learns one task at a time; got {len(tasks)}. Override learn_many to take more.")
        return self.learn(tasks[0])

    def predict_many(self, inputs: Sequence[Tensor], tasks: Sequence[str | None], reader: str = "") -> list[Prediction]:
        """Answer the inputs of several independent tasks, in the order of `learn_many`; by default one after the other."""
        return [self.predict(batch, task, reader) for batch, task in zip(inputs, tasks, strict=True)]

    def score(self, inputs: Tensor, targets: Tensor, task: str | None = None, reader: str = "") -> Tensor:
        """(B,) log-probability of each target, summed over a sequence's tokens; -inf for what the learner does not know."""
        prediction = self.predict(inputs, task, reader)
        if len(prediction.classes) == 0:
            return torch.full((len(inputs),), -torch.inf)
        log_probability = prediction.logits.float().log_softmax(-1)
        hit = prediction.classes == targets.to(prediction.classes.device)[..., None]
        return torch.where(hit, log_probability, -torch.inf).amax(-1).reshape(len(inputs), -1).sum(-1)

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        """Take a learned task out again.

        Args:
            task: what to forget, with its train set.
            retain: examples that must stay known, where the caller has some.

        Raises:
            ErasureNotSupported: the mechanism has no way to do it.
        """
        raise ErasureNotSupported(
            f"{type(self).__name__} cannot take '{task.name}' out again. Train anew without it, or choose a learner that can forget."
        )

    def footprint(self) -> Footprint:
        """What the knowledge costs to hold; by default all state is shared."""
        return Footprint(shared_bytes=state_bytes(self.state_dict()))

    def export(self, task: str | None = None) -> nn.Module:
        """The plain module that a user deploys: inputs (B, ...) -> logits (B, C)."""
        raise SettingError(f"{type(self).__name__} has no export; deploy its predict() instead.")


@dataclass
class Cursor:
    """Where a running verb stands: all that a resumed generator must know besides the weights.

    `begin` goes on at the stored step when the same verb on the same task was left open, else starts at 0.
    """

    verb: str = ""
    task: str = ""
    step: int = 0

    def begin(self, verb: Verb, task: str) -> int:
        """Open the cursor and return the number of steps that are already done."""
        if (self.verb, self.task) != (verb, task):
            self.verb, self.task, self.step = verb, task, 0
        return self.step

    def close(self) -> None:
        """The verb is done: a later call begins anew."""
        self.verb, self.task, self.step = "", "", 0

    def state_dict(self) -> State:
        return {"verb": self.verb, "task": self.task, "step": self.step}

    def load_state_dict(self, state: State) -> None:
        self.verb, self.task, self.step = state["verb"], state["task"], state["step"]


def require_learnable(learner: Learner, task: Task) -> Data:
    """The train set of a task that `learner` can take; call it first in `learn` and `forget`.

    Raises:
        DataError: the task has no train set.
        SettingError: the learner does not give this kind of answer.
    """
    if task.train is None:
        raise DataError(f"task '{task.name}' is test-only: it has no train set to learn or forget.")
    if task.answer not in learner.answers:
        raise SettingError(f"{type(learner).__name__} answers {learner.answers}, task '{task.name}' asks for {task.answer}.")
    return task.train


def fit(learner: Learner, task: Task, verb: Verb = "learn") -> Progress | None:
    """Run a verb to its end, for callers who do not care about steps; returns the last Progress, None if there was none."""
    last = None
    for last in learner.learn(task) if verb == "learn" else learner.forget(task):  # noqa: B007 - the last is the result
        pass
    return last
