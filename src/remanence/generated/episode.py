"""Episode: a batch of few-shot tasks, each with a support set to learn from and queries to answer.

    episode = Episode.from_labels(photos, ["oak", "elm", "oak", None], more_photos)
    logits = hypertransformer(episode)

A task numbers its classes 0..ways-1, its *slots*; which class stands in which slot carries no meaning.

Axes: B tasks; S support; Q query; C channels; H, W pixels; n ways (the most of any task); R rows of a learn2learn task.
"""

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.generated._checks import UNLABELED, check_tables, check_values

__all__ = ["UNLABELED", "Episode"]


def _left_out() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Episode:
    """Tasks of one shape, checked when they are made: what a learner gets holds what is said here.

    The checks read all values, so make it on the CPU and move it with `to`, which checks nothing again.

    Args:
        support_x: (B, S, C, H, W) floating point, finite also where masked.
        support_y: (B, S) int64: slots 0..ways-1, or `UNLABELED`; masked samples too.
        query_x: (B, Q, C, H, W) of the same dtype; Q may be 0.
        query_y: (B, Q) int64 slots; None where the answers are unknown.
        support_mask: (B, S) bool, True where a sample is present; None where all are.
        ways: (B,) int64; left out, one more than the largest label of each task.
        class_names: of every task, the names of its slots; empty where they have none.
        class_ids: (B, n) int64, which class a slot stands for: the same number wherever the class occurs; slots beyond a task's
            ways hold any number. None where unknown.
        allow_empty: a class may be without a labelled sample; it can then never be the answer.

    Raises:
        DataError: shapes, dtypes or devices disagree; a pixel is not finite; a label is no slot; a task has no labelled sample; a
            class has none and `allow_empty` is False. The message names task, and sample or class.

    Example:
        >>> episode = Episode(torch.rand(1, 3, 1, 4, 4), torch.tensor([[0, 1, UNLABELED]]), torch.rand(1, 0, 1, 4, 4))
        >>> len(episode), episode.ways
        (1, tensor([2]))
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor | None = None
    support_mask: Tensor | None = None
    ways: Tensor = field(default_factory=_left_out)
    class_names: tuple[tuple[str, ...], ...] = ()
    class_ids: Tensor | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        check_tables(self)
        if not len(self.ways):
            object.__setattr__(self, "ways", self._reach())
        check_values(self)

    def _reach(self) -> Tensor:
        largest = self.support_y.amax(1)
        if self.query_y is not None and self.query_y.shape[1]:
            largest = torch.maximum(largest, self.query_y.amax(1))
        return largest + 1

    @classmethod
    def from_tensors(cls, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor | None = None) -> "Episode":
        """One task without the B axis, or a batch of tasks with it; ways are read off the labels.

        Args:
            support_x: (S, C, H, W) or (B, S, C, H, W).
            support_y: (S,) or (B, S) int64.
            query_x: (Q, C, H, W) or (B, Q, C, H, W).
            query_y: (Q,) or (B, Q) int64, or None.

        Raises:
            DataError: as `Episode`.
        """
        if support_x.dim() == 4:
            answers = None if query_y is None else query_y[None]
            return cls(support_x[None], support_y[None], query_x[None], answers)
        return cls(support_x, support_y, query_x, query_y)

    @classmethod
    def from_labels(
        cls,
        support_x: Tensor,
        labels: Sequence[Hashable] | Tensor,
        query_x: Tensor,
        query_labels: Sequence[Hashable] | Tensor | None = None,
    ) -> "Episode":
        """One task whose labels are words or numbers of any kind; slots go by first appearance and keep the labels as names.

        Args:
            support_x: (S, C, H, W).
            labels: S of them (a list, a numpy array, a tensor); None where the label is unknown.
            query_x: (Q, C, H, W).
            query_labels: Q of them, each also among `labels`; None where the answers are unknown.

        Raises:
            DataError: a query's label occurs in no support sample, two labels print alike (1 and "1"), or as `Episode`.

        Example:
            >>> task = Episode.from_labels(torch.rand(3, 1, 4, 4), ["oak", "elm", None], torch.rand(1, 1, 4, 4), ["elm"])
            >>> task.support_y.tolist(), task.query_y.tolist(), task.class_names
            ([[0, 1, -1]], [[1]], (('oak', 'elm'),))
        """
        given = _as_list(labels)
        slots = {label: slot for slot, label in enumerate(dict.fromkeys(label for label in given if label is not None))}
        names = tuple(str(label) for label in slots)
        if len(set(names)) < len(names):
            alike = sorted({name for name in names if names.count(name) > 1})
            raise DataError(f"several labels print as {alike[:3]}; give labels of one kind, all words or all numbers.")
        asked = None if query_labels is None else _as_list(query_labels)
        unknown = [label for label in asked or () if label not in slots]
        if unknown:
            raise DataError(
                f"{len(unknown)} query labels occur in no support sample (first three: {unknown[:3]}); label a support sample of each."
            )
        support_y = torch.tensor([[UNLABELED if label is None else slots[label] for label in given]], dtype=torch.int64)
        query_y = None if asked is None else torch.tensor([[slots[label] for label in asked]], dtype=torch.int64)
        device = support_x.device
        answers = None if query_y is None else query_y.to(device)
        return cls(support_x[None], support_y.to(device), query_x[None], answers, class_names=(names,) if names else ())

    @classmethod
    def from_learn2learn(cls, batch: tuple[Tensor, Tensor], shots: int, ways: int) -> "Episode":
        """One task as learn2learn's task sets give it, with labels remapped to 0..ways-1 (`RemapLabels`).

        With as many queries as shots every other row of a class, from the first on, is support, as in learn2learn's MAML examples;
        with another number it is the first `shots` rows of each class, as in its `partition_task` and prototypical example.

        Args:
            batch: data (R, C, H, W) and labels (R,), with R / ways rows of each class, more than `shots`.
            shots: support rows of a class.
            ways: classes.

        Raises:
            SettingError: shots or ways below 1.
            DataError: rows do not divide into that many shots and at least one query of each class, or as `Episode`.

        Source: Arnold et al. 2020 (arXiv 2008.12284), the `fast_adapt` of its examples.

        Example:
            >>> task = Episode.from_learn2learn((torch.rand(4, 1, 4, 4), torch.tensor([0, 0, 1, 1])), shots=1, ways=2)
            >>> task.support_y, task.query_y
            (tensor([[0, 1]]), tensor([[0, 1]]))
        """
        data, labels = batch
        if shots < 1 or ways < 1:
            raise SettingError(f"shots: {shots}, ways: {ways}; give 1 or more of each.")
        is_support = _learn2learn_support(labels, shots, ways, len(data))
        return cls.from_tensors(data[is_support], labels[is_support].long(), data[~is_support], labels[~is_support].long())

    def __len__(self) -> int:
        """B, how many tasks."""
        return len(self.support_x)

    @cached_property
    def n_max(self) -> int:
        """The most ways of any task: how many logits a query gets."""
        return int(self.ways.max())

    def to(self, device: torch.device | str) -> "Episode":
        """The same episode with all tensors on `device`."""
        return self._with({name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)})

    def select(self, tasks: Tensor) -> "Episode":
        """The episode of some tasks: an int64 index or a bool mask over B that leaves at least one.

        `n_max` is that of the tasks that are left.

        Raises:
            DataError: no task is left, or `tasks` is a single number (give it as a list of one).
        """
        numbers = torch.arange(len(self), device=tasks.device)[tasks]
        if numbers.dim() != 1 or not len(numbers):
            raise DataError(f"tasks selects {tuple(numbers.shape)} of {len(self)}; give a 1-D index or mask that leaves at least one.")
        chosen: dict[str, object] = {name: value[tasks] for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.class_names:
            chosen["class_names"] = tuple(self.class_names[task] for task in numbers.tolist())
        other = self._with(chosen)
        if other.class_ids is not None:
            object.__setattr__(other, "class_ids", other.class_ids[:, : other.n_max])
        return other

    def _with(self, changes: dict[str, object]) -> "Episode":
        """A copy without a second check: what was valid stays so."""
        other = copy.copy(self)
        vars(other).pop("n_max", None)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other


def _as_list(labels: Sequence[Hashable] | Tensor) -> list[Hashable]:
    # tolist also of numpy arrays: their scalars hash alike, but print with their type
    return list(labels.tolist() if hasattr(labels, "tolist") else labels)


def _learn2learn_support(labels: Tensor, shots: int, ways: int, n_rows: int) -> Tensor:
    """(R,) bool, which rows of a learn2learn task are support."""
    per_class, rest = divmod(n_rows, ways)
    slots, found = torch.unique(labels, return_counts=True)
    if labels.shape != (n_rows,) or rest or per_class <= shots or found.tolist() != [per_class] * ways:
        raise DataError(
            f"{n_rows} rows with {len(labels)} labels of {len(slots)} classes do not make {ways} classes of {shots} shots and as many "
            f"queries each; give learn2learn's KShots shots + queries rows."
        )
    by_class = torch.argsort(labels, stable=True).view(ways, per_class)
    is_support = torch.zeros(n_rows, dtype=torch.bool, device=labels.device)
    is_support[by_class[:, ::2] if per_class == 2 * shots else by_class[:, :shots]] = True
    return is_support
