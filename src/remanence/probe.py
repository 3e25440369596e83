"""How a learner is read without being changed: View, Reading, Probe."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from remanence.errors import SettingError
from remanence.learner import Learner, Prediction
from remanence.state import copy_state
from remanence.task import Stream, Task


@dataclass(frozen=True)
class Reading:
    """One number that a probe read.

    Args:
        subject: name of the task that was measured; "" when the number is about the learner as a whole.
        metric: what was measured.
        value: None where it could not be measured; then `note` says why.
        unit: "1" for shares, else bytes, seconds, examples, ...
        reader: which read-out of the learner.
        at: position on a curve that the probe itself traced (examples seen by a fork); None for a plain number.
        exact: False for what differs from run to run (seconds, peak memory).
        note: free text.
    """

    subject: str
    metric: str
    value: float | None
    unit: str
    reader: str = ""
    at: int | None = None
    exact: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        if self.value is None and not self.note:
            raise SettingError(f"reading '{self.metric}' of '{self.subject}' has no value and no note; say why it could not be measured.")


@dataclass(frozen=True)
class View:
    """All that a probe gets: the learner to read, the stream, and what just happened.

    Args:
        learner: read it, never train it; train `fork()` or `fresh()`.
        stream: where the tasks come from.
        event: index of the event that ended or is running; -1 before the first.
        verb: of that event; "" before the first.
        current: the tasks of that event.
        make: builds a learner that has learned nothing.
    """

    learner: Learner
    stream: Stream
    event: int
    verb: str
    current: tuple[Task, ...]
    make: Callable[[], Learner]

    @property
    def subjects(self) -> tuple[Task, ...]:
        """The tasks to measure: all of a sequential stream, the current ones of independent tasks."""
        if self.stream.mode == "independent":
            return tuple(leaf for task in self.current for leaf in task.leaves)
        return self.stream.subjects

    def fresh(self) -> Learner:
        """A learner that never learned anything."""
        return self.make()

    def fork(self) -> Learner:
        """A learner with the same state, which may be trained without touching the original; artifacts are shared."""
        twin = self.make()
        twin.load_state_dict(copy_state(self.learner.state_dict()))
        return twin

    def name_for(self, task: Task) -> str | None:
        """What `predict` is told of a task: its name where the stream tells it, and for bystanders.

        A bystander is what the backbone's owner already used; he knows what he asks.
        """
        is_bystander = any(task.name == other.name for other in self.stream.bystanders)
        return task.name if self.stream.task_id_at_test or is_bystander else None

    def predict(self, task: Task, reader: str = "", learner: Learner | None = None) -> Prediction:
        """Answers for a task's test set under the stream's rules; `learner` stands in for the viewed one."""
        return (learner or self.learner).predict(task.test.inputs, self.name_for(task), reader)


class Probe(ABC):
    """A stateless measurement.

    Attributes:
        name: column `probe` of the ledger.
        at: when it runs. It always runs before the first event. "event": after each event; an int k: every k steps as
            well; "log": at steps 1, 2, 4, 8, ... as well.
        verbs: which events it follows.
    """

    name: str
    at: int | Literal["event", "log"] = "event"
    verbs: tuple[str, ...] = ("", "learn", "forget")

    @abstractmethod
    def __call__(self, view: View) -> Iterator[Reading]:
        """Measure; what must train does so on `view.fork()` or `view.fresh()`."""

    def due(self, step: int) -> bool:
        """Whether the probe runs after this step (counted from 1) of a running event."""
        if self.at == "event":
            return False
        if self.at == "log":
            return step & (step - 1) == 0
        return step % self.at == 0


def check_grid(at: int | str) -> None:
    """Refuse a probe grid that is neither a positive number of steps, nor "event", nor "log"."""
    if not (at in ("event", "log") or (isinstance(at, int) and at > 0)):
        raise SettingError(f"at: {at!r} is no probe grid; give 'event', 'log' or a number of steps above 0.")
