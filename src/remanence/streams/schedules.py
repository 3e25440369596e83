"""Ways of presenting the tasks of a stream anew: all at once, in one pass, each alone, learned and then forgotten."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from remanence.errors import SettingError, nearest
from remanence.keys import generator
from remanence.streams._cut import CutStream
from remanence.task import Data, Event, Stream, Task, concatenate


def joint(stream: Stream, name: str = "all at once") -> CutStream:
    """The i.i.d. upper bound: one event that teaches everything, measured part by part.

    Args:
        stream: sequential, without forget events; put `learn_then_forget` around the joint stream instead.
        name: of the one task, whose parts are the stream's subjects.

    Raises:
        SettingError: the stream is of independent tasks, or forgets; or `name` is that of a part.

    Example:
        >>> from remanence.streams import digits, split_classes
        >>> (event,) = joint(split_classes(digits()))
        >>> event.task.name, len(event.task.parts), len(event.task.train)
        ('all at once', 5, 1347)
    """
    _require_learning(stream, "joint")
    return _Joint(stream, name)


class _Joint(CutStream):
    def __init__(self, stream: Stream, name: str) -> None:
        if name in [task.name for task in (*stream.subjects, *stream.bystanders)]:
            raise SettingError(f"name: '{name}' is already that of a task of '{stream.name}'; choose another.")
        super().__init__(f"{stream.name}, {name}", [stream, name], task_id_at_test=stream.task_id_at_test, bystanders=stream.bystanders)
        self._stream, self._task_name = stream, name

    def __len__(self) -> int:
        return 1

    def build(self, index: int) -> Event:
        parts = self._stream.subjects
        valid = [part.valid for part in parts if part.valid is not None]
        return Event(
            "learn",
            Task(
                name=self._task_name,
                train=concatenate(_train(part) for part in parts),
                test=concatenate(part.test for part in parts),
                valid=concatenate(valid) if valid else None,
                answer=parts[0].answer,
                parts=parts,
            ),
        )


def online(stream: Stream, chunk: int, blur: float = 0.0, order_seed: int = 0) -> CutStream:
    """One pass: the stream's tasks in small chunks, each example drawn once, boundaries sharp or blurred.

    Each task's examples come in an order drawn from `order_seed`. A learn event is a chunk; it is named after the task
    that most of its examples come from (the earlier one where two are even), and is tested as that task. No chunk
    straddles a boundary, so a task's last chunk may be smaller.

    Args:
        stream: sequential, without forget events. Around `joint(...)` it is the one-pass upper bound.
        chunk: examples per event, 1 or more.
        blur: in [0, 1]: the share of the smaller task at a boundary that mixes with its neighbour: half of that share
            from either side of the boundary changes places at random. 0 keeps the boundaries; 1 mixes half of each
            task into each neighbour's nearer half.
        order_seed: what the order of examples is drawn from.

    Raises:
        SettingError: a setting out of range, a stream of independent tasks or one that forgets, or `blur` on a stream
            that tells the task at test time (a mixed chunk has no one task to name).

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), one pass. ours: the blur.

    Example:
        >>> from remanence.streams import digits, split_classes
        >>> stream = online(split_classes(digits()), chunk=100)
        >>> len(stream), len(stream.subjects), len(stream[0].task.train), stream[0].task.train.one_pass
        (15, 5, 100, True)
    """
    if chunk < 1:
        raise SettingError(f"chunk: {chunk} examples; give 1 or more.")
    if not 0 <= blur <= 1:
        raise SettingError(f"blur: {blur} lies outside [0, 1].")
    if blur > 0 and stream.task_id_at_test:
        raise SettingError(
            f"blur: {blur} mixes tasks, but '{stream.name}' tells the task at test time; set blur: 0 or task_id_at_test: false."
        )
    _require_learning(stream, "online")
    return _Online(stream, chunk, blur, order_seed)


class _Online(CutStream):
    def __init__(self, stream: Stream, chunk: int, blur: float, order_seed: int) -> None:
        super().__init__(
            f"{stream.name}, online",
            [stream, chunk, blur, order_seed],
            task_id_at_test=stream.task_id_at_test,
            bystanders=stream.bystanders,
        )
        self._stream, self._blur, self._order_seed = stream, blur, order_seed
        self._tasks = [event.task for event in stream]
        self._spans: list[tuple[int, int]] = []
        start = 0
        for task in self._tasks:
            end = start + len(_train(task))
            self._spans += [(first, min(first + chunk, end)) for first in range(start, end, chunk)]
            start = end

    def __len__(self) -> int:
        return len(self._spans)

    @cached_property
    def subjects(self) -> tuple[Task, ...]:
        return self._stream.subjects

    @cached_property
    def _plan(self) -> tuple[Tensor, Tensor]:
        """For every position of the pass: which task its example comes from, and which row of that task's train set."""
        sizes = torch.tensor([len(_train(task)) for task in self._tasks])
        task = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        row = torch.cat([self._order(index) for index in range(len(sizes))])
        end = 0
        for index in range(len(sizes) - 1):
            end += int(sizes[index])
            half = int(self._blur * int(sizes[index : index + 2].min()) / 2)
            zone = slice(end - half, end + half)
            mixed = torch.randperm(2 * half, generator=generator("blur", self._order_seed, index))
            task[zone], row[zone] = task[zone][mixed], row[zone][mixed]
        return task, row

    def _order(self, index: int) -> Tensor:
        train = _train(self._tasks[index])
        if train.ordered:
            return torch.arange(len(train))
        return torch.randperm(len(train), generator=generator("online", self._order_seed, index))

    def build(self, index: int) -> Event:
        first, end = self._spans[index]
        task, row = (column[first:end] for column in self._plan)
        counts = torch.bincount(task, minlength=len(self._tasks))
        pieces = [_train(self._tasks[own]).select(row[task == own]) for own in counts.nonzero().flatten().tolist()]
        table = concatenate(pieces)
        most = int((counts == counts.max()).nonzero()[0])  # argmax promises nothing about ties
        return Event("learn", replace(self._tasks[most], train=replace(table, one_pass=True), parts=()))


def alone(stream: Stream) -> CutStream:
    """The control: the same tasks, each learned from the base state, as if it were the only one.

    Args:
        stream: sequential, without forget events.

    Raises:
        SettingError: the stream is of independent tasks already, or forgets.

    Example:
        >>> from remanence.streams import digits, split_classes
        >>> alone(split_classes(digits())).mode
        'independent'
    """
    _require_learning(stream, "alone")
    return _Alone(stream)


class _Alone(CutStream):
    def __init__(self, stream: Stream) -> None:
        super().__init__(f"{stream.name}, each alone", [stream], "independent", stream.task_id_at_test, stream.bystanders)
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def build(self, index: int) -> Event:
        return self._stream[index]


def learn_then_forget(stream: Stream, forget: list[int] | list[str]) -> CutStream:
    """All of a stream, and then forget events for some of what it taught.

    Args:
        stream: sequential. Of a joint stream the parts can be forgotten, of an online one the underlying tasks.
        forget: subjects of the stream, by position (-1 is the latest) or by name, in the order in which they are to be forgotten.

    Raises:
        SettingError: nothing to forget, an unknown subject, one twice, or a stream of independent tasks.

    Example:
        >>> from remanence.streams import digits, split_classes
        >>> stream = learn_then_forget(split_classes(digits()), forget=[0])
        >>> stream[-1].verb, stream[-1].task.name == stream[0].task.name
        ('forget', True)
    """
    if stream.mode == "independent":
        raise SettingError(f"learn_then_forget needs a sequential stream; the tasks of '{stream.name}' are independent, so nothing stays.")
    return _LearnThenForget(stream, forget)


class _LearnThenForget(CutStream):
    def __init__(self, stream: Stream, forget: Sequence[int | str]) -> None:
        super().__init__(
            f"{stream.name}, then forget",
            [stream, list(forget)],
            task_id_at_test=stream.task_id_at_test,
            bystanders=stream.bystanders,
        )
        self._stream = stream
        self._forgotten = [_subject(stream, wanted) for wanted in forget]
        names = [task.name for task in self._forgotten]
        if not names or len(set(names)) < len(names):
            raise SettingError(f"forget: {list(forget)}; name at least one subject, each once.{_known(stream)}")

    def __len__(self) -> int:
        return len(self._stream) + len(self._forgotten)

    @cached_property
    def subjects(self) -> tuple[Task, ...]:
        return self._stream.subjects

    def build(self, index: int) -> Event:
        n_learned = len(self._stream)
        return self._stream[index] if index < n_learned else Event("forget", self._forgotten[index - n_learned])


def _subject(stream: Stream, wanted: int | str) -> Task:
    by_name = {task.name: task for task in stream.subjects}
    if isinstance(wanted, int):
        if not -len(by_name) <= wanted < len(by_name):
            raise SettingError(f"forget: there is no subject {wanted} in '{stream.name}'.{_known(stream)}")
        return stream.subjects[wanted]
    if wanted not in by_name:
        raise SettingError(f"forget: there is no subject '{wanted}' in '{stream.name}'.{nearest(wanted, by_name)}")
    return by_name[wanted]


def _known(stream: Stream) -> str:
    return " Subjects: " + ", ".join(f"{index} = '{task.name}'" for index, task in enumerate(stream.subjects)) + "."


def _train(task: Task) -> Data:
    """The train set of a task that a learn event teaches."""
    if task.train is None:
        raise SettingError(f"task '{task.name}' is test-only and cannot be taught; leave it to the bystanders.")
    return task.train


def _require_learning(stream: Stream, who: str) -> None:
    if stream.mode == "independent":
        raise SettingError(f"{who} needs a sequential stream; the tasks of '{stream.name}' are independent (episodes, or alone).")
    if any(event.verb == "forget" for event in stream):
        raise SettingError(f"{who} re-cuts learn events, but '{stream.name}' forgets too; put learn_then_forget around {who}(...) instead.")
