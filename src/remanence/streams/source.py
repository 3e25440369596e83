"""Source: one labelled set of images, before any scenario cuts it into tasks.

Axes: N images; C channels; H, W pixels.

Example:
    >>> from remanence.streams import digits
    >>> pretraining = turned(part(digits(), "pretrain"))
    >>> pretraining.name, len(pretraining.classes), pretraining.class_names[pretraining.classes[-1]]
    ('digits pretrain turned', 30, '9 turned 270°')
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.keys import Key, generator
from remanence.task import Data, example_ids, origins

PARTS = ("stream", "pretrain")
_NO_ROW = torch.zeros(1, dtype=torch.int64)
_ONE_VARIANT = int(example_ids("", _NO_ROW, 1) - example_ids("", _NO_ROW, 0))


@dataclass(frozen=True, eq=False)
class Source:
    """A set of images by class, with a fixed train/test split of its rows.

    Args:
        name: shown in reports.
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64, 0 or above; gaps are fine.
        ids: (N,) int64 from `task.example_ids`, unique.
        is_test: (N,) bool.
        class_names: label -> name; names differ from one another.
        n_labels: labels of the untouched set lie below this number, also those that are not selected here; 0 means one more than the
            largest label.

    Raises:
        DataError: a shape, dtype, range, id or name is not as said above.
    """

    name: str
    images: Tensor
    labels: Tensor
    ids: Tensor
    is_test: Tensor
    class_names: dict[int, str]
    n_labels: int = 0

    def __post_init__(self) -> None:
        self._check_tables()
        self._check_values()
        self._check_names()
        if self.n_labels <= int(self.labels.max()):
            object.__setattr__(self, "n_labels", int(self.labels.max()) + 1)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The labels that occur, ascending."""
        return tuple(torch.unique(self.labels).tolist())

    @property
    def train(self) -> Data:
        """The rows that may be learned."""
        return self.data(~self.is_test)

    @property
    def test(self) -> Data:
        """The rows that only probes read."""
        return self.data(self.is_test)

    def data(self, rows: Tensor) -> Data:
        """The table of these rows; `rows` is an index or a mask over N."""
        return Data(self.images[rows], self.labels[rows], self.ids[rows])

    def select(self, mask: Tensor) -> "Source":
        """The source of the rows where `mask` (N,) holds, under the same name."""
        if mask.dtype != torch.bool or mask.shape != self.labels.shape:
            raise DataError(f"'{self.name}': a mask of {len(self)} booleans is needed, got {mask.dtype} of shape {tuple(mask.shape)}.")
        return replace(self, images=self.images[mask], labels=self.labels[mask], ids=self.ids[mask], is_test=self.is_test[mask])

    def fingerprint(self) -> str:
        """Hex sha256 of images, labels, ids and split; computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels, self.ids, self.is_test):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def _check_tables(self) -> None:
        if self.images.dim() != 4 or self.images.dtype != torch.float32:
            raise DataError(
                f"'{self.name}': images must be (N, C, H, W) float32, got {tuple(self.images.shape)} {self.images.dtype}. "
                f"Grey images have C = 1."
            )
        n = len(self.images)
        if n == 0:
            raise DataError(f"'{self.name}' has no images; select at least one.")
        columns = (("labels", self.labels, torch.int64), ("ids", self.ids, torch.int64), ("is_test", self.is_test, torch.bool))
        for label, column, dtype in columns:
            if column.shape != (n,) or column.dtype != dtype:
                raise DataError(f"'{self.name}': {label} must be ({n},) {dtype}, got {tuple(column.shape)} {column.dtype}.")

    def _check_values(self) -> None:
        low, high = (float(value) for value in self.images.aminmax())
        if not (low >= 0 and high <= 1):  # not (low < 0 or high > 1): NaN must fail too
            raise DataError(f"'{self.name}': pixels must lie in [0, 1], got [{low:g}, {high:g}]. Divide by the largest pixel value.")
        if int(self.labels.min()) < 0:
            raise DataError(f"'{self.name}': label {int(self.labels.min())} is negative; number the classes from 0.")
        n_repeated = len(self) - len(torch.unique(self.ids))
        if n_repeated:
            raise DataError(f"'{self.name}': {n_repeated} of {len(self)} ids occur twice; give every image an id of its own.")

    def _check_names(self) -> None:
        unnamed = [label for label in self.classes if label not in self.class_names]
        if unnamed:
            raise DataError(f"'{self.name}': {len(unnamed)} classes have no name (first three: {unnamed[:3]}); add them to class_names.")
        names = [self.class_names[label] for label in self.classes]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise DataError(f"'{self.name}': several classes are called {repeated[:3]}; give each a name of its own.")


def turned(source: Source, quarter_turns: tuple[int, ...] = (1, 2, 3)) -> Source:
    """New classes: every class turned anticlockwise by 90° times each of `quarter_turns`; exact.

    With `part`, this is what a backbone is pretrained on: rows and classes that the stream does not use. Some turned
    classes resemble untouched ones (a 6 upside down is nearly a 9), so the two are distinct, not unrelated.

    Args:
        source: untouched, with square images.
        quarter_turns: which of 1, 2 and 3, each at most once.

    Returns:
        A source with label + k * n_labels for k quarter turns; the ids carry variant k of the same rows.

    Raises:
        SettingError: a turn is not one of 1, 2, 3, or comes twice.
        DataError: images are not square, or were turned before.
    """
    turns = tuple(quarter_turns)
    if not turns or len(set(turns)) < len(turns) or not set(turns) <= {1, 2, 3}:
        raise SettingError(f"quarter_turns must be some of 1, 2 and 3, each once; got {turns}.")
    require_square(source)
    if variants(source.ids).any():
        raise DataError(f"'{source.name}' was turned or permuted before; start from the untouched source.")
    return Source(
        name=f"{source.name} turned",
        images=torch.cat([source.images.rot90(k, (2, 3)) for k in turns]),
        labels=torch.cat([source.labels + k * source.n_labels for k in turns]),
        ids=torch.cat([with_variant(source.ids, k) for k in turns]),
        is_test=source.is_test.repeat(len(turns)),
        class_names={
            label + k * source.n_labels: f"{source.class_names[label]} turned {90 * k}°" for k in turns for label in source.classes
        },
        n_labels=4 * source.n_labels,
    )


def part(source: Source, which: Literal["stream", "pretrain"], pretrain_share: float = 0.4) -> Source:
    """One of two disjoint parts of the rows: what the stream uses, and what a backbone may be pretrained on.

    The split is stratified by class and by train/test, and drawn from the source's name alone, so no seed moves it.
    Both parts keep their own train and test rows.

    Args:
        source: what to split.
        which: "stream" (keeps the name) or "pretrain" (says so in its name).
        pretrain_share: share of the rows of each class that goes to "pretrain", in (0, 1); where a class has two rows
            or more, each part gets one.

    Raises:
        SettingError: `which` or `pretrain_share` is not as said above.
        DataError: the part would be empty.
    """
    if which not in PARTS:
        raise SettingError(f"which: '{which}' is no part; choose 'stream' or 'pretrain'.")
    if not 0 < pretrain_share < 1:
        raise SettingError(f"pretrain_share: {pretrain_share} lies outside (0, 1).")
    strata = source.labels * 2 + source.is_test
    is_pretrain = draw_share(strata, pretrain_share, "part", source.name)
    if which == "stream":
        return source.select(~is_pretrain)
    return replace(source.select(is_pretrain), name=f"{source.name} pretrain")


def draw_share(strata: Tensor, share: float, *key: Key) -> Tensor:
    """(N,) bool: a share of the rows of every stratum, drawn from (key, stratum).

    Of two rows or more at least one is drawn and one is left; a single row is left.

    Args:
        strata: (N,) int64; rows of one value are one stratum.
        share: in [0, 1]; 0 draws nothing.
        key: what the choice is drawn from.
    """
    drawn = torch.zeros(len(strata), dtype=torch.bool)
    if share == 0:
        return drawn
    for stratum, rows in rows_by_value(strata).items():
        n = min(max(round(len(rows) * share), 1), len(rows) - 1)
        drawn[rows[torch.randperm(len(rows), generator=generator(*key, stratum))[:n]]] = True
    return drawn


def rows_by_value(values: Tensor) -> dict[int, Tensor]:
    """Value -> its rows, ascending in both, for int64 `values` (N,)."""
    order = torch.argsort(values, stable=True)
    found, counts = torch.unique(values, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return {value: order[end - count : end] for value, count, end in zip(found.tolist(), counts.tolist(), ends, strict=True)}


def variants(ids: Tensor) -> Tensor:
    """(N,) the variant that each id carries; 0 for originals."""
    return (ids - origins(ids)) // _ONE_VARIANT


def with_variant(ids: Tensor, variant: Tensor | int) -> Tensor:
    """The ids of transformed copies, from the ids of originals or other copies; `variant` in 0..255, one or (N,)."""
    return origins(ids) + variant * _ONE_VARIANT


def require_square(source: Source) -> None:
    """Refuse what a quarter turn would change the shape of."""
    height, width = source.images.shape[2:]
    if height != width:
        raise DataError(f"'{source.name}': images of {height} x {width} pixels cannot be turned by 90°; use square ones.")


def require_one_shape(sources: Sequence[Source]) -> None:
    """Refuse sources whose images differ in channels or size.

    Raises:
        DataError: with all shapes.
    """
    shapes = {source.name: tuple(source.images.shape[1:]) for source in sources}
    if len(set(shapes.values())) > 1:
        raise DataError(f"images of one stream must share (C, H, W); got {shapes}. Bring them to one shape first.")


