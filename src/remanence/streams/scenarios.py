"""Ways of cutting a source into a sequence of tasks: by class, by angle, by permutation of pixels.

The class order has a seed of its own, apart from any learner's: the order alone moves results by points.

Axes: N images; C channels; H, W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from remanence.errors import SettingError
from remanence.keys import generator
from remanence.streams._changes import Change, Permutation, Turn
from remanence.streams._cut import CutStream, bystander_tasks, split_valid
from remanence.streams.source import Source, require_square, variants, with_variant
from remanence.task import Data, Event, Task

LONGEST_NAME = 40
N_VARIANTS = 256


def split_classes(
    source: Source,
    per_task: int = 2,
    order_seed: int = 0,
    task_id_at_test: bool = False,
    valid_share: float = 0.0,
    bystanders: list[Source] | tuple[Source, ...] = (),
) -> CutStream:
    """Classes arrive in turn: class-incremental, or task-incremental when the task is told at test time.

    Args:
        source: every class needs train and test images.
        per_task: classes per task; the last task takes what is left.
        order_seed: what the class order is drawn from, together with nothing else.
        task_id_at_test: True is task-incremental: `predict` is told the task's name.
        valid_share: share of each class's train rows that is set apart for model selection, in [0, 1); the same rows
            whatever the order.
        bystanders: sources whose test images are watched and never learned.

    Raises:
        SettingError: `per_task` or `valid_share` out of range, bystanders of one name.
        DataError: a class without train or test images; a bystander of another image shape, or one that leaks.

    Source: van de Ven and Tolias 2019 (arXiv 1904.07734), the scenarios' names.

    Example:
        >>> from remanence.streams import digits
        >>> [event.task.name for event in split_classes(digits(), per_task=4)]
        ['classes 2, 5, 6, 9', 'classes 0, 3, 7, 8', 'classes 1, 4']
    """
    return _SplitClasses(source, per_task, order_seed, task_id_at_test, valid_share, tuple(bystanders))


class _SplitClasses(CutStream):
    def __init__(
        self,
        source: Source,
        per_task: int,
        order_seed: int,
        task_id_at_test: bool,
        valid_share: float,
        bystanders: tuple[Source, ...],
    ) -> None:
        if not 1 <= per_task <= len(source.classes):
            raise SettingError(f"per_task: {per_task} lies outside 1..{len(source.classes)}, the number of classes in '{source.name}'.")
        order = torch.randperm(len(source.classes), generator=generator("order", order_seed)).tolist()
        classes = [sorted(source.classes[place] for place in order[i : i + per_task]) for i in range(0, len(order), per_task)]
        names = _names_of(classes, source.class_names)
        settings = [source, per_task, order_seed, task_id_at_test, valid_share, bystanders]
        super().__init__(
            f"{source.name}, {per_task} {'class' if per_task == 1 else 'classes'} a task",
            settings,
            task_id_at_test=task_id_at_test,
            bystanders=bystander_tasks(bystanders, source, names),
        )
        self._source, self._classes, self._names = source, classes, names
        self._train, self._valid = split_valid(source, valid_share)

    def __len__(self) -> int:
        return len(self._classes)

    def build(self, index: int) -> Event:
        source = self._source
        mine = torch.isin(source.labels, torch.tensor(self._classes[index]))
        return Event("learn", _task(source, self._names[index], self._train & mine, source.is_test & mine, self._valid & mine))


def _task(source: Source, name: str, train: Tensor, test: Tensor, valid: Tensor) -> Task:
    return Task(name, source.data(train), source.data(test), source.data(valid) if valid.any() else None)


def _names_of(groups: list[list[int]], class_names: dict[int, str]) -> list[str]:
    """A name per group of classes: all class names where they are short, else the first and how many more."""
    names = []
    for group in groups:
        words = [class_names[label] for label in group]
        name = f"{'class' if len(group) == 1 else 'classes'} {', '.join(words)}"
        names.append(name if len(name) <= LONGEST_NAME or len(group) == 1 else f"classes {words[0]} and {len(words) - 1} more")
    if len(set(names)) < len(names):  # class names with commas in them
        return [f"{number}: {name}" for number, name in enumerate(names)]
    return names


def domains(
    source: Source,
    degrees: list[int] | tuple[int, ...] = (0, 90, 180, 270),
    order_seed: int = 0,
    task_id_at_test: bool = False,
    valid_share: float = 0.0,
    bystanders: list[Source] | tuple[Source, ...] = (),
) -> CutStream:
    """Domain-incremental: the same classes in every task, turned anticlockwise by another angle.

    Right angles are exact; others are interpolated bilinearly, with 0 outside the image.

    Args:
        source: square images where an angle is not a multiple of 180.
        degrees: one task each; whole degrees that differ modulo 360.
        order_seed: what the order of the angles is drawn from.
        task_id_at_test, valid_share, bystanders: as in `split_classes`.

    Raises:
        SettingError: no angle, or one twice.
        DataError: as in `split_classes`, or images that are not square.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), rotated MNIST. ours: all rows in every task.

    Example:
        >>> from remanence.streams import digits
        >>> [event.task.name for event in domains(digits(), degrees=[0, 45])]
        ['turned 0°', 'turned 45°']
    """
    angles = [angle % 360 for angle in degrees]
    if not angles or len(set(angles)) < len(angles):
        raise SettingError(f"degrees: {list(degrees)}; give at least one angle, each once (modulo 360).")
    if any(angle % 180 for angle in angles):
        require_square(source)
    order = torch.randperm(len(angles), generator=generator("order", order_seed)).tolist()
    # right angles carry the variants that `turned` gives them; the others follow
    changes = [Turn(angles[place], angles[place] // 90 if angles[place] % 90 == 0 else 4 + place) for place in order]
    settings = [source, list(degrees), order_seed, task_id_at_test, valid_share, list(bystanders)]
    return _Changed(source, changes, 4 + len(angles), f"{source.name}, turned", settings, task_id_at_test, valid_share, tuple(bystanders))


def permuted(
    source: Source,
    n_tasks: int = 5,
    order_seed: int = 0,
    task_id_at_test: bool = False,
    valid_share: float = 0.0,
    bystanders: list[Source] | tuple[Source, ...] = (),
) -> CutStream:
    """Domain-incremental: the same classes in every task, their pixels in another order; the first task is untouched.

    Args:
        source: images of any size; channels move together.
        n_tasks: 1..256.
        order_seed: what the permutations are drawn from.
        task_id_at_test, valid_share, bystanders: as in `split_classes`.

    Raises:
        SettingError: `n_tasks` out of range.
        DataError: as in `split_classes`.

    Source: Goodfellow et al. 2013 (arXiv 1312.6211), permuted MNIST.

    Example:
        >>> from remanence.streams import digits
        >>> [event.task.name for event in permuted(digits(), n_tasks=2)]
        ['permutation 0', 'permutation 1']
    """
    if not 1 <= n_tasks <= N_VARIANTS:
        raise SettingError(f"n_tasks: {n_tasks} lies outside 1..{N_VARIANTS}.")
    changes = [Permutation(number, order_seed) for number in range(n_tasks)]
    settings = [source, n_tasks, order_seed, task_id_at_test, valid_share, list(bystanders)]
    return _Changed(source, changes, n_tasks, f"{source.name}, permuted", settings, task_id_at_test, valid_share, tuple(bystanders))


class _Changed(CutStream):
    def __init__(
        self,
        source: Source,
        changes: Sequence[Change],
        n_variants: int,
        name: str,
        settings: list[object],
        task_id_at_test: bool,
        valid_share: float,
        bystanders: tuple[Source, ...],
    ) -> None:
        most = (int(variants(source.ids).max()) + 1) * n_variants
        if most > N_VARIANTS:
            raise SettingError(f"{most} variants of an image cannot be told apart by its id (at most {N_VARIANTS}); ask for fewer tasks.")
        watched = bystander_tasks(bystanders, source, [change.name for change in changes])
        super().__init__(name, settings, task_id_at_test=task_id_at_test, bystanders=watched)
        self._source, self._changes, self._n_variants = source, changes, n_variants
        self._train, self._valid = split_valid(source, valid_share)

    def __len__(self) -> int:
        return len(self._changes)

    def build(self, index: int) -> Event:
        source, change = self._source, self._changes[index]
        ids = with_variant(source.ids, variants(source.ids) * self._n_variants + change.variant)

        def table(rows: Tensor) -> Data:
            return Data(change(source.images[rows]), source.labels[rows], ids[rows])

        valid = table(self._valid) if self._valid.any() else None
        return Event("learn", Task(change.name, table(self._train), table(source.is_test), valid))
