"""What arrives, and in which order: Data, Task, Event, Stream.

Axes: N examples; C channels; H, W pixels; T tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.keys import Key, generator, key_seed

Verb = Literal["learn", "forget"]
Answer = Literal["classes", "tokens"]
Mode = Literal["sequential", "independent"]


_VARIANT_BITS, _ROW_BITS = 8, 31


def example_ids(source: str, rows: Tensor, variant: int = 0) -> Tensor:
    """Ids that tell examples apart across sources: 24 bits name the source, 8 the variant, 31 the row.

    Args:
        source: name of the untouched source; turned or permuted copies of an image keep it.
        rows: (N,) row numbers in that source, below 2**31.
        variant: 0 for the original, 1..255 for a transformed copy.

    Returns:
        (N,) int64.
    """
    if not 0 <= variant < 1 << _VARIANT_BITS:
        raise SettingError(f"variant {variant} lies outside 0..{(1 << _VARIANT_BITS) - 1}.")
    return (key_seed("source", source) >> 39 << 39) | variant << _ROW_BITS | rows.to(torch.int64)


def origins(ids: Tensor) -> Tensor:
    """Ids without their variant: equal for an image and all its transformed copies. Leak checks compare these."""
    return ids & ~(((1 << _VARIANT_BITS) - 1) << _ROW_BITS)


def source_bits(ids: Tensor) -> Tensor:
    """The part of ids that names their source."""
    return ids >> (_VARIANT_BITS + _ROW_BITS)


@dataclass(frozen=True, eq=False)
class Data:
    """A table of examples in memory.

    Args:
        inputs: (N, ...) pixels in [0, 1] as float32, or token ids as int64.
        targets: (N,) the source's class labels, or (N, T) token ids; int64.
        ids: (N,) int64, unique within the table; see `example_ids`.
        ordered: the order of rows is content (a document), so that `rows` never shuffles.
        one_pass: every example may be drawn once (online learning); `rows` refuses a second pass.

    Raises:
        DataError: lengths disagree, or an id occurs twice.

    Example:
        >>> table = Data(torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]), torch.arange(4))
        >>> len(table), table.rows(0, 3, "seed").shape
        (4, torch.Size([3]))
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor
    ordered: bool = False
    one_pass: bool = False

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(self.inputs) != n or len(self.targets) != n:
            raise DataError(
                f"inputs, targets and ids must be of one length; got {len(self.inputs)}, {len(self.targets)} and {n}. "
                f"Select the same rows of all three."
            )
        if len(torch.unique(self.ids)) != n:
            raise DataError(f"{n - len(torch.unique(self.ids))} of {n} ids occur twice; give every example an id of its own.")

    def __len__(self) -> int:
        return len(self.ids)

    def steps(self, epochs: int, size: int) -> int:
        """How many batches of `size` make `epochs` passes; 0 for an empty table.

        Raises:
            SettingError: the rows may be seen once, and `epochs` is more.
        """
        if self.one_pass and epochs > 1:
            raise SettingError(f"epochs={epochs}, but these {len(self)} examples may be seen once; set epochs: 1.")
        return -(-len(self) * epochs // max(1, min(size, len(self))))

    def rows(self, step: int, size: int, *key: Key) -> Tensor:
        """The row numbers of a step's batch: a pure function of (step, size, key).

        Every pass visits each row once, in an order drawn from (key, pass); a batch may straddle two passes, so that
        all batches are of one size. With `one_pass` the last batch is cut short instead.

        Args:
            step: counted from 0.
            size: rows per batch; no more than N are given.
            key: what the order is drawn from, seed first.

        Returns:
            (min(size, N),) int64.

        Raises:
            DataError: the table is empty.
            SettingError: `one_pass` holds and the step lies beyond the first pass.
        """
        n = len(self)
        if n == 0:
            raise DataError("an empty table has no batches; check len(data) before drawing from it.")
        size = min(size, n)
        epoch, offset = divmod(step * size, n)
        if self.one_pass and epoch:
            raise SettingError(f"step {step} of {size} rows begins a second pass over {n} rows that may be seen once; set epochs: 1.")
        # cloned: the caller may write into it, the cache may not change
        return _batches(n, epoch, size, self.ordered, self.one_pass, key)[offset // size].clone()

    def select(self, rows: Tensor) -> "Data":
        """The table of these rows, in this order; `rows` is an index or a mask over N."""
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows], ids=self.ids[rows])


@lru_cache(maxsize=16)
def _batches(n: int, epoch: int, size: int, ordered: bool, one_pass: bool, key: tuple[Key, ...]) -> tuple[Tensor, ...]:
    """The batches that begin in a pass; cut once a pass, because a step's Python runs on cold caches and is dear."""
    first = -epoch * n % size
    order = _order(n, epoch, ordered, key)[first:]
    missing = -len(order) % size
    if missing and not one_pass:
        order = torch.cat([order, _order(n, epoch + 1, ordered, key)[:missing]])
    return torch.split(order, size)


@lru_cache(maxsize=16)
def _order(n: int, epoch: int, ordered: bool, key: tuple[Key, ...]) -> Tensor:
    return torch.arange(n) if ordered else torch.randperm(n, generator=generator(*key, "epoch", epoch))


def concatenate(tables: Iterable[Data]) -> Data:
    """One table of all rows, in order.

    Raises:
        DataError: no table is given, shapes differ, or an example stands in two of them.
    """
    tables = list(tables)
    if not tables:
        raise DataError("nothing to concatenate: give at least one table.")
    shapes = sorted({tuple(table.inputs.shape[1:]) for table in tables})
    if len(shapes) > 1:
        raise DataError(f"inputs of different shapes cannot share a table: {shapes}. Bring them to one shape first.")
    return replace(
        tables[0],
        inputs=torch.cat([table.inputs for table in tables]),
        targets=torch.cat([table.targets for table in tables]),
        ids=torch.cat([table.ids for table in tables]),
    )


@dataclass(frozen=True, eq=False)
class Task:
    """Something to learn, and how to tell whether it was learned.

    Args:
        name: unique within a stream; the only thing `predict` may be told of a task.
        train: what is learned; None for a test-only task (a bystander).
        test: read by probes only.
        valid: cut from train; what model selection reads.
        answer: "classes" or "tokens".
        parts: of a composite task: the private shards of peers, or the tasks a joint one unites.

    Raises:
        DataError: an example, or a transformed copy of it, stands in two of train, valid and test.
    """

    name: str
    train: Data | None
    test: Data
    valid: Data | None = None
    answer: Answer = "classes"
    parts: "tuple[Task, ...]" = ()

    def __post_init__(self) -> None:
        named = [(label, data) for label, data in (("train", self.train), ("valid", self.valid), ("test", self.test)) if data is not None]
        for index, (label, data) in enumerate(named):
            for other, earlier in named[:index]:
                n_shared = int(torch.isin(origins(data.ids), origins(earlier.ids)).sum())
                if n_shared:
                    raise DataError(f"task '{self.name}': {n_shared} examples of {label} stand in {other} too; split by id.")

    @property
    def classes(self) -> tuple[int, ...]:
        """The source labels that occur in train (in test, where there is no train), ascending."""
        targets = (self.test if self.train is None else self.train).targets
        return tuple(torch.unique(targets).tolist())

    @property
    def leaves(self) -> "tuple[Task, ...]":
        """The parts of a composite task, or the task itself: what is measured one by one."""
        return self.parts or (self,)

    def select(self, rows: Tensor) -> "Task":
        """A part of this task (a class, an example), under the same name.

        Args:
            rows: index or mask over train. Of test and valid those rows stay whose class is among the selected.
        """
        if self.train is None:
            raise DataError(f"task '{self.name}' has no train set to select from.")
        train = self.train.select(rows)
        if self.answer != "classes":
            return replace(self, train=train)
        kept = torch.unique(train.targets)
        test = self.test.select(torch.isin(self.test.targets, kept))
        valid = None if self.valid is None else self.valid.select(torch.isin(self.valid.targets, kept))
        return replace(self, train=train, test=test, valid=valid, parts=())


@dataclass(frozen=True)
class Event:
    """One thing that happens to a learner: it learns a task, or is asked to forget one.

    Args:
        verb: "learn" or "forget".
        task: what.
        retain: with "forget": examples that must stay known, for mechanisms that read them again.
    """

    verb: Verb
    task: Task
    retain: Data | None = None


class Stream(Sequence[Event], ABC):
    """An ordered, seeded sequence of events; item i is a pure function of (seed, i).

    Attributes:
        name: shown in reports.
        mode: "sequential": knowledge accumulates; "independent": every task starts from the base state.
        task_id_at_test: whether `predict` is told the name of the task that an input comes from.
        bystanders: test-only tasks that nobody learns here: what the backbone knew before.
    """

    name: str
    mode: Mode = "sequential"
    task_id_at_test: bool = False
    bystanders: tuple[Task, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def event(self, index: int) -> Event:
        """The event at `index`, 0 <= index < len(self)."""

    @property
    def subjects(self) -> tuple[Task, ...]:
        """The tasks that probes measure after every event: each learned task (part of a composite one) once, in order."""
        found: dict[str, Task] = {}
        for event in self:
            for leaf in event.task.leaves:
                if event.verb == "learn":
                    found.setdefault(leaf.name, leaf)
        return tuple(found.values())

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        if isinstance(index, slice):
            return [self.event(position) for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        # without IndexError the Sequence protocol would iterate a lazy stream for ever
        if not 0 <= position < len(self):
            raise IndexError(f"stream '{self.name}' has {len(self)} events, no event {index}")
        return self.event(position)
