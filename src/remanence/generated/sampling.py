"""Episodes and sequences of episodes from labelled sources: a step's draw is a pure function of (seed, step).

Axes: B tasks or sequences; T tasks of a sequence; n ways; r rows of a class; S support; Q query.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from remanence.generated._pool import Pool
from remanence.generated.episode import UNLABELED, Episode
from remanence.keys import generator
from remanence.streams import Source


class EpisodeSampler:
    """Independent tasks of one source.

    Args:
        source: all its rows are drawn from.
        ways: classes of a task; a range (lo, hi) is drawn once a step, so that the tasks of a step share it.
        shots: labelled rows of a class; a range is drawn for every class of every task and padded with the mask.
        queries: query rows of a class.
        tasks: per step.
        unlabeled: further support rows of every class, whose label is withheld; they stand behind the labelled ones.
        quarter_turns: a class turned by 90, 180 or 270° is a class of its own.
        seed: what all draws depend on.
    """

    def __init__(
        self,
        source: Source,
        ways: int | tuple[int, int] = 5,
        shots: int | tuple[int, int] = 1,
        queries: int = 15,
        tasks: int = 8,
        unlabeled: int = 0,
        quarter_turns: bool = False,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.ways, self.shots = _as_range(ways), _as_range(shots)
        self.queries, self.tasks, self.unlabeled, self.seed = queries, tasks, unlabeled, seed
        self._pool = Pool([source], quarter_turns)

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels of the source that it draws from, ascending."""
        return self.source.classes

    def sample(self, step: int) -> Episode:
        """The episode of a step: `tasks` tasks, their rows class by class."""
        draw = generator(self.seed, "episodes", step)
        n, shots = _number(self.ways, draw), self.shots[1]
        classes = self._pool.draw_classes(0, (self.tasks,), n, draw)
        rows = self._pool.draw_rows(classes, shots + self.unlabeled + self.queries, draw)
        query, labelled, unlabelled = rows.split((self.queries, shots, self.unlabeled), dim=2)
        present = None
        if self.shots[0] < shots:
            per_class = torch.randint(self.shots[0], shots + 1, (self.tasks, n, 1), generator=draw)
            present = torch.arange(shots) < per_class
        return _episode(self._pool, classes, query, labelled, unlabelled, present)


class SequenceSampler:
    """Sequences of tasks whose classes differ from task to task, for learners that carry something from one task to the next.

    Args:
        sources: one, or several of one image shape; every task of every sequence then draws its source at random.
        n_tasks: of a sequence; a range (lo, hi) is drawn once a step.
        ways, shots, queries: as in `EpisodeSampler`.
        sequences: per step.
        repeat_prob: how likely each class of a later task is replaced by one that its sequence saw before.
        quarter_turns, seed: as in `EpisodeSampler`.
    """

    def __init__(
        self,
        sources: Sequence[Source] | Source,
        n_tasks: int | tuple[int, int] = 3,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        sequences: int = 6,
        repeat_prob: float = 0.0,
        quarter_turns: bool = False,
        seed: int = 0,
    ) -> None:
        self.sources = (sources,) if isinstance(sources, Source) else tuple(sources)
        self.n_tasks = _as_range(n_tasks)
        self.ways, self.shots, self.queries, self.sequences = ways, shots, queries, sequences
        self.repeat_prob, self.seed = repeat_prob, seed
        self._pool = Pool(self.sources, quarter_turns)

    def sample(self, step: int) -> tuple[Episode, ...]:
        """The tasks of a step in their order, each an episode with B = `sequences`."""
        draw = generator(self.seed, "sequences", step)
        n_tasks = _number(self.n_tasks, draw)
        fresh = self._fresh(n_tasks, draw)
        slots = self._slots(n_tasks, draw)
        classes = fresh.gather(1, slots)
        rows = self._rows(fresh, slots, draw).unflatten(1, (n_tasks, self.ways))
        query, labelled, rest = rows.split((self.queries, self.shots, 0), dim=3)
        classes = classes.unflatten(1, (n_tasks, self.ways))
        return tuple(
            _episode(self._pool, classes[:, task], query[:, task], labelled[:, task], rest[:, task], None) for task in range(n_tasks)
        )

    def _fresh(self, n_tasks: int, draw: Generator) -> Tensor:
        """(B, T * n) different classes, task by task."""
        n = n_tasks * self.ways
        drawn = torch.stack([self._pool.draw_classes(source, (self.sequences,), n, draw) for source in range(len(self.sources))], dim=-1)
        if len(self.sources) == 1:
            return drawn[..., 0]
        chosen = torch.randint(len(self.sources), (self.sequences, n_tasks, 1), generator=draw).expand(-1, -1, self.ways)
        return drawn.gather(2, chosen.reshape(self.sequences, n, 1))[..., 0]

    def _slots(self, n_tasks: int, draw: Generator) -> Tensor:
        """(B, T * n) which of the fresh classes stands at each place; its own, unless it gave way to an earlier one."""
        n, own = self.ways, torch.arange(n_tasks * self.ways).expand(self.sequences, -1)
        if self.repeat_prob == 0:
            return own
        slots = own.clone()
        for first in range(n, n_tasks * n, n):
            was_used = slots[:, :first] == own[:, :first]
            score = torch.rand(self.sequences, first, generator=draw)
            earlier = torch.where(was_used, score, -1.0).topk(n).indices  # all of task 0 was used, so n are found
            gives_way = torch.rand(self.sequences, n, generator=draw) < self.repeat_prob
            slots[:, first : first + n] = torch.where(gives_way, earlier, slots[:, first : first + n])
        return slots

    def _rows(self, fresh: Tensor, slots: Tensor, draw: Generator) -> Tensor:
        """(B, T * n, r): each time a class comes again it takes the next rows of one shuffled order of its rows."""
        r = self.queries + self.shots
        n_times = slots.shape[1] // self.ways if self.repeat_prob else 1
        order = self._pool.draw_rows(fresh, r * n_times, draw)
        if n_times == 1:
            return order
        is_same = (slots[:, :, None] == slots[:, None, :]).tril(-1)
        position = is_same.sum(2)[..., None] * r + torch.arange(r)
        n_rows = self._pool.n_rows[fresh.gather(1, slots) % self._pool.n_upright]
        order = order.gather(1, slots[..., None].expand(-1, -1, order.shape[2]))
        return order.gather(2, position % n_rows[..., None])


def _episode(pool: Pool, classes: Tensor, query: Tensor, labelled: Tensor, unlabelled: Tensor, present: Tensor | None) -> Episode:
    """Of classes (B, n), rows (B, n, r) of each kind, and which labelled ones are there (B, n, shots)."""
    n_tasks, n = classes.shape
    slot = torch.arange(n)
    support_y = slot.repeat_interleave(labelled.shape[2]).expand(n_tasks, -1)
    support_x = pool.pixels(classes, labelled)
    mask = None
    if present is not None:
        mask = present.flatten(1)
        support_y = torch.where(mask, support_y, UNLABELED)
        support_x.mul_(mask[..., None, None, None])
    n_unlabelled = n * unlabelled.shape[2]
    if n_unlabelled:
        support_x = torch.cat([support_x, pool.pixels(classes, unlabelled)], dim=1)
        support_y = torch.cat([support_y, torch.full((n_tasks, n_unlabelled), UNLABELED)], dim=1)
        mask = mask if mask is None else torch.cat([mask, torch.ones(n_tasks, n_unlabelled, dtype=torch.bool)], dim=1)
    return Episode(
        support_x,
        support_y.contiguous(),
        pool.pixels(classes, query),
        slot.repeat_interleave(query.shape[2]).repeat(n_tasks, 1),
        mask,
        torch.full((n_tasks,), n),
        tuple(tuple(pool.names[number] for number in row) for row in classes.tolist()),
        pool.class_ids[classes],
    )


def _as_range(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _number(bounds: tuple[int, int], draw: Generator) -> int:
    return bounds[0] if bounds[0] == bounds[1] else int(torch.randint(bounds[0], bounds[1] + 1, (), generator=draw))
