"""The classes that samplers draw from: of one or several sources, each perhaps turned by quarters.

A class has a number in 0..M-1; a source's classes are `first[s] .. first[s] + sizes[s] - 1`, and turn k adds k * `n_upright`.

Axes: M classes; R rows of the largest class; C channels; H, W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from remanence.errors import DataError, SettingError
from remanence.streams import Source
from remanence.streams.source import require_one_shape, require_square, variants, with_variant
from remanence.task import origins

_ROW = (1 << 31) - 1  # the bits of an example id that number its row


class Pool:
    """Row tables over the images of the sources, which are neither copied nor changed.

    Args:
        sources: of one image shape; no class stands in two of them.
        quarter_turns: every class, turned anticlockwise by 0, 90, 180 and 270°, makes four classes; images are square then.

    Attributes:
        n_rows: (n_upright,) how many rows a class has.
        class_ids: (M,) int64, the same for the same class wherever it is drawn; made of its source, turn and label.
        names: of the M classes.

    Raises:
        DataError: shapes differ, images cannot be turned, or a class stands in two sources.
    """

    def __init__(self, sources: Sequence[Source], quarter_turns: bool) -> None:
        require_one_shape(sources)
        if quarter_turns:
            for source in sources:
                _require_upright(source)
        self.images = tuple(source.images for source in sources)
        self.sizes = tuple(len(source.classes) for source in sources)
        self._sources = tuple(sources)
        self.first = tuple(sum(self.sizes[:index]) for index in range(len(sources)))
        self.n_upright = sum(self.sizes)
        self.n_turns = 4 if quarter_turns else 1
        self._lay_rows(sources)
        upright = torch.cat([class_ids(source) for source in sources])
        if len(torch.unique(upright)) < len(upright):
            raise DataError(f"the sources {[source.name for source in sources]} share classes; select different classes of each.")
        self.class_ids = torch.cat([with_variant(upright, turn) for turn in range(self.n_turns)])
        names = [source.class_names[label] for source in sources for label in source.classes]
        self.names = names + [f"{name} turned {90 * turn}°" for turn in range(1, self.n_turns) for name in names]

    def _lay_rows(self, sources: Sequence[Source]) -> None:
        counts = [torch.unique(source.labels, return_counts=True)[1] for source in sources]
        self.n_rows = torch.cat(counts)
        self._source_of = torch.arange(len(sources)).repeat_interleave(torch.tensor(self.sizes))
        self._table = torch.zeros(self.n_upright, int(self.n_rows.max()), dtype=torch.int64)
        self._present = torch.arange(self._table.shape[1]) < self.n_rows[:, None]
        # boolean assignment fills class by class, which is the order of a stable sort by label
        self._table[self._present] = torch.cat([torch.argsort(source.labels, stable=True) for source in sources])

    def require_classes(self, needed: int) -> None:
        """Refuse a source with fewer than `needed` classes, turned ones included."""
        for source, size in zip(self._sources, self.sizes, strict=True):
            if size * self.n_turns < needed:
                n_classes = size * self.n_turns
                raise SettingError(f"{needed} different classes are needed, '{source.name}' has {n_classes}; lower ways or n_tasks.")

    def require_rows(self, needed: int) -> None:
        """Refuse a class with fewer than `needed` rows."""
        fewest = int(self.n_rows.argmin())
        if int(self.n_rows[fewest]) < needed:
            raise DataError(
                f"class '{self.names[fewest]}' has {int(self.n_rows[fewest])} rows, shots, unlabelled and queries need {needed}; "
                f"lower them or leave such classes out."
            )

    def draw_classes(self, source: int, shape: tuple[int, ...], n: int, generator: Generator) -> Tensor:
        """(*shape, n) int64: different classes of one source, in random order."""
        size = self.sizes[source]
        local = torch.rand(*shape, size * self.n_turns, generator=generator).topk(n).indices
        return self.first[source] + local % size + local // size * self.n_upright

    def draw_rows(self, classes: Tensor, n: int, generator: Generator) -> Tensor:
        """(*classes.shape, min(n, R)) rows of the source of each class, in random order and without repetition.

        What lies beyond the number of rows of a class repeats its first row of the source; callers never read it.
        """
        upright = classes % self.n_upright
        order = torch.rand(*classes.shape, self._table.shape[1], generator=generator)
        order = torch.where(self._present[upright], order, -1.0)
        return self._table[upright].gather(-1, order.topk(min(n, order.shape[-1])).indices)

    def pixels(self, classes: Tensor, rows: Tensor) -> Tensor:
        """The images, turned as their classes are.

        Args:
            classes: (B, n).
            rows: (B, n, r) from `draw_rows`.

        Returns:
            (B, n * r, C, H, W).
        """
        flat = classes.flatten()
        taken = self._gather(flat % self.n_upright, rows.flatten(0, 1))
        turn = flat // self.n_upright
        for quarter in range(1, self.n_turns):
            where = (turn == quarter).nonzero()[:, 0]
            taken[where] = taken[where].rot90(quarter, (3, 4))
        return taken.view(len(classes), -1, *taken.shape[2:])

    def _gather(self, upright: Tensor, rows: Tensor) -> Tensor:
        shape = (*rows.shape, *self.images[0].shape[1:])
        if len(self.images) == 1:
            return self.images[0].index_select(0, rows.flatten()).view(shape)
        taken = torch.empty(shape)
        for index, images in enumerate(self.images):
            where = (self._source_of[upright] == index).nonzero()[:, 0]
            taken[where] = images[rows[where]]
        return taken


def class_ids(source: Source) -> Tensor:
    """(n classes,) int64, ascending by label: example ids of the source with the label in place of the row."""
    order = torch.argsort(source.labels, stable=True)
    labels, counts = torch.unique(source.labels, return_counts=True)
    first = order[counts.cumsum(0) - counts]
    ids: Tensor = (origins(source.ids[first]) & ~_ROW) | labels
    return ids


def _require_upright(source: Source) -> None:
    require_square(source)
    if variants(source.ids).any():
        raise DataError(f"'{source.name}' was turned or permuted before; give the untouched source to quarter_turns.")
