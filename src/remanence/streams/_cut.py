"""What all streams of this room share: built tasks are kept, content has a fingerprint, leaks are refused."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from remanence.errors import DataError, SettingError
from remanence.streams.source import Source, draw_share, require_one_shape
from remanence.task import Event, Mode, Stream, Task, origins


class CutStream(Stream):
    """A stream over sources or over other streams.

    A built event is kept, so that the many readers of a task share one copy of its images.

    Args:
        name: shown in reports.
        content: what `fingerprint` is made of: the settings, and sources or streams.
        mode, task_id_at_test, bystanders: as in `Stream`.
    """

    def __init__(
        self,
        name: str,
        content: Sequence[object],
        mode: Mode = "sequential",
        task_id_at_test: bool = False,
        bystanders: tuple[Task, ...] = (),
    ) -> None:
        self.name, self.mode, self.task_id_at_test, self.bystanders = name, mode, task_id_at_test, bystanders
        self._content = content
        self._events: dict[int, Event] = {}

    def event(self, index: int) -> Event:
        if index not in self._events:
            self._events[index] = self.build(index)
        return self._events[index]

    @abstractmethod
    def build(self, index: int) -> Event:
        """The event at `index`, 0 <= index < len(self), from nothing but the settings."""

    @cached_property
    def subjects(self) -> tuple[Task, ...]:
        return super().subjects

    def fingerprint(self) -> str:
        """Hex sha256 of the settings and of the content of the sources: equal for equal streams."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        words = [type(self).__name__, *map(_content_word, self._content)]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _content_word(item: object) -> Any:
    if isinstance(item, Source | CutStream):
        return [item.name, item.fingerprint()]
    if isinstance(item, Stream):  # a user's own stream: all that is known of it are its events
        return [item.name, *(_task_word(event.verb, event.task) for event in item)]
    if isinstance(item, list | tuple):
        return [_content_word(part) for part in item]
    return item


def _task_word(verb: str, task: Task) -> list[str]:
    words = [verb, task.name]
    for table in (task.train, task.valid, task.test):
        if table is not None:
            digest = hashlib.sha256(table.ids.numpy().tobytes() + table.targets.numpy().tobytes())
            digest.update(table.inputs.contiguous().numpy().tobytes())
            words.append(digest.hexdigest())
    return words


def split_valid(source: Source, valid_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (N,) over the source: the rows to train on, and those for model selection.

    Drawn from the source's name and the class alone, never from test rows: a row is in valid in every task that uses
    it, or in none, so that tasks may share rows and be united without a leak.

    Raises:
        SettingError: the share lies outside [0, 1).
        DataError: a class has no train or no test images.
    """
    if not 0 <= valid_share < 1:
        raise SettingError(f"valid_share: {valid_share} lies outside [0, 1).")
    for side, rows in (("train", ~source.is_test), ("test", source.is_test)):
        found = set(source.labels[rows].tolist())
        absent = [source.class_names[label] for label in source.classes if label not in found]
        if absent:
            raise DataError(
                f"'{source.name}': {len(absent)} of {len(source.classes)} classes have no {side} images (first three: {absent[:3]}); "
                f"leave these classes out with select()."
            )
    train = (~source.is_test).nonzero().flatten()
    is_valid = torch.zeros(len(source), dtype=torch.bool)
    is_valid[train] = draw_share(source.labels[train], valid_share, "valid", source.name)
    return ~source.is_test & ~is_valid, is_valid


def bystander_tasks(bystanders: Sequence[Source], source: Source, task_names: Sequence[str]) -> tuple[Task, ...]:
    """Test-only tasks, one per source.

    Raises:
        SettingError: two of them share a name, or one has that of a task.
        DataError: one has no test rows, another image shape, or shows in its test what the stream trains on.
    """
    names = [other.name for other in bystanders]
    if len({*names, *task_names}) < len(names) + len(task_names):
        raise SettingError(f"bystanders must differ in name, from one another and from the tasks; got {names} beside {list(task_names)}.")
    require_one_shape([source, *bystanders])
    trained = origins(source.ids[~source.is_test])
    for other in bystanders:
        n_leaked = int(torch.isin(origins(other.ids[other.is_test]), trained).sum())
        if n_leaked:
            raise DataError(
                f"bystander '{other.name}': {n_leaked} of its test images are, turned or not, trained on in '{source.name}'; "
                f"give it test images of its own, for example through part()."
            )
        if not other.is_test.any():
            raise DataError(f"bystander '{other.name}' has no test images, so nothing of it can be watched.")
    return tuple(Task(other.name, None, other.test) for other in bystanders)
