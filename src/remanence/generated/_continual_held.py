"""What a continual learner holds, and what it replays from.

Axes: P classes held.
"""

from dataclasses import dataclass, field, replace

import torch

from remanence.generated._learner_model import table_state
from remanence.generated.continual import ContinualHyperTransformer, ContinualState
from remanence.parts import TaskBook
from remanence.state import State, copy_state
from remanence.task import Data


@dataclass(frozen=True, eq=False)
class Held:
    """What is known after some tasks; never changed in place, so that an older one is a snapshot.

    Args:
        state: of one sequence, P columns.
        labels: the P source labels, in order of arrival.
        counts: examples of each class of each task.
    """

    state: ContinualState
    labels: tuple[int, ...] = ()
    counts: dict[str, dict[int, int]] = field(default_factory=dict)

    def saved(self) -> State:
        state = self.state
        return {
            "slices": state.slices, "prototypes": state.prototypes, "counts": state.counts, "task_of_class": state.task_of_class,
            "n_steps": state.n_tasks, "labels": list(self.labels), "book": self.book().state(),
        }  # fmt: skip

    def book(self) -> TaskBook:
        book = TaskBook()
        book.load({name: dict(counts) for name, counts in self.counts.items()})
        return book

    def without(self, labels: set[int]) -> "Held":
        """The same weights with the means of some classes gone."""
        columns = torch.tensor([column for column, label in enumerate(self.labels) if label not in labels], dtype=torch.int64)
        state, columns = self.state, columns.to(self.state.prototypes.device)
        pruned = {name: {label: n for label, n in counts.items() if label not in labels} for name, counts in self.counts.items()}
        state = replace(
            state, prototypes=state.prototypes[:, columns], counts=state.counts[:, columns], task_of_class=state.task_of_class[columns]
        )  # fmt: skip
        kept = tuple(label for label in self.labels if label not in labels)
        return Held(state, kept, {name: counts for name, counts in pruned.items() if counts})

    @classmethod
    def load(cls, saved: State, model: ContinualHyperTransformer, device: torch.device) -> "Held":
        """What `saved` was taken from; copies."""
        saved = copy_state(saved)
        slices = {name: value.to(device) for name, value in saved["slices"].items()}
        columns = {name: saved[name].to(device) for name in ("prototypes", "counts", "task_of_class")}
        tensors = model.tensors_of(slices) if saved["n_steps"] else {}
        state = replace(model.init_state(), slices=slices, n_tasks=saved["n_steps"], tensors=tensors, **columns)
        book = TaskBook()
        book.load(saved["book"])
        return cls(state, tuple(saved["labels"]), counts_of(book))


@dataclass(frozen=True, eq=False)
class Lesson:
    """A task as it was learned, for replay: its examples, what was held before it, and how many of its steps were taken."""

    name: str
    data: Data
    before: Held
    n_steps: int

    def saved(self) -> State:
        return {"name": self.name, "data": table_state(self.data), "before": self.before.saved(), "n_steps": self.n_steps}

    @classmethod
    def load(cls, saved: State, model: ContinualHyperTransformer, device: torch.device) -> "Lesson":
        """What `saved` was taken from; copies."""
        return cls(saved["name"], Data(**copy_state(saved["data"])), Held.load(saved["before"], model, device), saved["n_steps"])

    def holds(self, data: Data) -> bool:
        """Whether some of these examples are among the lesson's."""
        return bool(torch.isin(self.data.ids, data.ids).any())


def counts_of(book: TaskBook) -> dict[str, dict[int, int]]:
    """Examples per task and class."""
    return {name: {int(label): n for label, n in counts.items()} for name, counts in book.state().items()}
