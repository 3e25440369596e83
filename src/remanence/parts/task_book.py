"""What was learned by name: which classes each task brought, and how many examples of each."""

from collections.abc import Iterable

import torch

from remanence.errors import DataError
from remanence.state import State
from remanence.task import Data, Task


class TaskBook:
    """Examples learned per task and class.

    Example:
        >>> book = TaskBook()
        >>> book.add("a", Data(torch.zeros(3, 1), torch.tensor([4, 4, 5]), torch.arange(3)))
        >>> book.classes("a"), book.names()
        ([4, 5], ['a'])
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[int, int]] = {}

    def __contains__(self, task: object) -> bool:
        return task in self._counts

    def names(self) -> list[str]:
        """Learned tasks in order of arrival."""
        return list(self._counts)

    def classes(self, task: str) -> list[int]:
        """Classes of a task, ascending."""
        return sorted(self._counts[task])

    def all_classes(self) -> set[int]:
        """Classes of all tasks."""
        return {label for counts in self._counts.values() for label in counts}

    def add(self, task: str, data: Data) -> None:
        """Note what a task's train set holds; examples of a task that comes again are added."""
        counts = self._counts.setdefault(task, {})
        for label, count in _count(data).items():
            counts[label] = counts.get(label, 0) + count

    def require(self, task: Task) -> None:
        """Refuse a task of which nothing was learned.

        Raises:
            DataError: neither the task nor, for a composite, all of its classes were learned.
        """
        if self.owner(task) is None:
            raise DataError(f"'{task.name}' was never learned, so it cannot be forgotten; learned: {', '.join(self.names()) or 'nothing'}.")

    def remove(self, task: Task) -> list[int]:
        """Strike a task's examples out; returns the classes of which none is left anywhere.

        A part of a jointly learned task is struck from the joint one.
        """
        before = self.all_classes()
        assert task.train is not None
        owner = self.owner(task)
        if owner is not None:
            counts, gone = self._counts[owner], _count(task.train)
            kept = {label: count - gone.get(label, 0) for label, count in counts.items() if count > gone.get(label, 0)}
            if kept:
                self._counts[owner] = kept
            else:
                del self._counts[owner]
        return sorted(before - self.all_classes())

    def owner(self, task: Task) -> str | None:
        """The learned task that holds these examples: itself, or a joint task that has all of its classes."""
        if task.name in self._counts:
            return task.name
        wanted = set(task.classes)
        return next((name for name, counts in self._counts.items() if wanted and wanted <= counts.keys()), None)

    def n_examples(self, task: str) -> int:
        """Examples learned of a task."""
        return sum(self._counts[task].values())

    def state(self) -> State:
        return {name: {str(label): count for label, count in counts.items()} for name, counts in self._counts.items()}

    def load(self, state: State) -> None:
        self._counts = {name: {int(label): count for label, count in counts.items()} for name, counts in state.items()}


def _count(data: Data) -> dict[int, int]:
    labels, counts = torch.unique(data.targets, return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def columns_of(classes: list[int], wanted: Iterable[int]) -> list[int]:
    """Column numbers of the wanted labels among `classes`, in their order."""
    chosen = set(wanted)
    return [column for column, label in enumerate(classes) if label in chosen]
