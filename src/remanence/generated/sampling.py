"""Episodes and sequences of episodes from labelled sources: a step's draw is a pure function of (seed, step).

    train, test = EpisodeSampler(omniglot(), quarter_turns=True), EpisodeSampler(omniglot("evaluation"), seed=1)
    require_disjoint(train, test)
    episode = train.sample(step=0)

Nothing random is stored, so a run that resumes at step k needs only k. Which class gets which slot is drawn anew each time.

Axes: B tasks or sequences; T tasks of a sequence; n ways; r rows of a class; S support; Q query.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from remanence.errors import DataError, SettingError
from remanence.generated._pool import Pool, class_ids
from remanence.generated.episode import UNLABELED, Episode
from remanence.keys import generator
from remanence.streams import Source
from remanence.task import origins

Range = int | tuple[int, int]


class EpisodeSampler:
    """Independent tasks of one source.

    The support rows of a task stand class by class, the labelled ones of all classes first; so do its queries. No row of a class
    is drawn twice in a task; a class and its turned copies draw apart.

    Args:
        source: all its rows are drawn from; its images are not copied.
        ways: classes of a task; a range (lo, hi) is drawn once a step, so that the tasks of a step share it.
        shots: labelled rows of a class; a range is drawn for every class of every task, and what is missing of its upper end is
            masked, black and unlabelled.
        queries: query rows of a class.
        tasks: per step.
        unlabeled: further support rows of every class, whose label is withheld; they stand behind the labelled ones.
        quarter_turns: a class turned anticlockwise by 90, 180 or 270° is a class of its own, and may meet the upright one in a task.
        seed: what all draws depend on.

    Raises:
        SettingError: a number below 1 (`unlabeled`: below 0), a range that runs backwards, or more ways than classes.
        DataError: a class has fewer rows than shots, unlabelled and queries together; images that cannot be turned.

    Source: Vinyals et al. 2016 (arXiv 1606.04080); turned classes as in Santoro et al. 2016 (arXiv 1605.06065).

    Example:
        >>> from remanence.streams import digits
        >>> episode = EpisodeSampler(digits(), ways=3, shots=(1, 4), queries=2, tasks=6).sample(step=10)
        >>> episode.support_x.shape, episode.query_y[0]
        (torch.Size([6, 12, 1, 8, 8]), tensor([0, 0, 1, 1, 2, 2]))
    """

    def __init__(
        self,
        source: Source,
        ways: Range = 5,
        shots: Range = 1,
        queries: int = 15,
        tasks: int = 8,
        unlabeled: int = 0,
        quarter_turns: bool = False,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.ways, self.shots = _bounds("ways", ways), _bounds("shots", shots)
        _require_counts(queries=queries, tasks=tasks)
        if unlabeled < 0:
            raise SettingError(f"unlabeled: {unlabeled}; give 0 or more rows of every class.")
        self.queries, self.tasks, self.unlabeled, self.seed = queries, tasks, unlabeled, seed
        self._pool = Pool([source], quarter_turns)
        self._pool.require_classes(self.ways[1])
        self._pool.require_rows(self.shots[1] + unlabeled + queries)

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
        query, labelled, unlabelled = torch.split(rows, [self.queries, shots, self.unlabeled], dim=2)
        present = None
        if self.shots[0] < shots:
            per_class = torch.randint(self.shots[0], shots + 1, (self.tasks, n, 1), generator=draw)
            present = torch.arange(shots) < per_class
        return _episode(self._pool, classes, query, labelled, present, unlabelled)


class SequenceSampler:
    """Sequences of tasks whose classes differ from task to task, for learners that carry something from one task to the next.

    Args:
        sources: one, or several of one image shape; every task of every sequence then draws its source at random.
        n_tasks: of a sequence; a range (lo, hi) is drawn once a step.
        ways, shots, queries: as in `EpisodeSampler`, without ranges.
        sequences: per step.
        repeat_prob: how likely each class of a later task is replaced by one that its sequence saw before, of whichever source.
            It then comes with rows that the sequence has not shown while there are any, and after that with its former queries.
        quarter_turns, seed: as in `EpisodeSampler`.

    Raises:
        SettingError: a number below 1, a range that runs backwards, `repeat_prob` outside [0, 1], no source, or a source with
            fewer classes than all tasks of a sequence need, since they may all draw from it.
        DataError: a class has fewer rows than shots and queries together; image shapes differ; a class stands in two sources;
            images that cannot be turned.

    Example:
        >>> from remanence.streams import digits
        >>> tasks = SequenceSampler(digits(), n_tasks=(2, 3), ways=3, sequences=2).sample(step=0)
        >>> [task.class_names[0] for task in tasks]
        [('3', '8', '7'), ('1', '6', '0'), ('5', '4', '2')]
    """

    def __init__(
        self,
        sources: Sequence[Source] | Source,
        n_tasks: Range = 3,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        sequences: int = 6,
        repeat_prob: float = 0.0,
        quarter_turns: bool = False,
        seed: int = 0,
    ) -> None:
        self.sources = (sources,) if isinstance(sources, Source) else tuple(sources)
        if not self.sources:
            raise SettingError("sources: none is given; give at least one.")
        self.n_tasks = _bounds("n_tasks", n_tasks)
        _require_counts(ways=ways, shots=shots, queries=queries, sequences=sequences)
        if not 0 <= repeat_prob <= 1:
            raise SettingError(f"repeat_prob: {repeat_prob} lies outside [0, 1].")
        self.ways, self.shots, self.queries, self.sequences = ways, shots, queries, sequences
        self.repeat_prob, self.seed = repeat_prob, seed
        self._pool = Pool(self.sources, quarter_turns)
        self._pool.require_classes(self.n_tasks[1] * ways)
        self._pool.require_rows(shots + queries)

    def sample(self, step: int) -> tuple[Episode, ...]:
        """The tasks of a step in their order, each an episode with B = `sequences`."""
        draw = generator(self.seed, "sequences", step)
        n_tasks = _number(self.n_tasks, draw)
        fresh = self._fresh(n_tasks, draw)
        slots = self._slots(n_tasks, draw)
        by_task = zip(
            torch.split(fresh.gather(1, slots), self.ways, dim=1),
            torch.split(self._rows(fresh, slots, draw), self.ways, dim=1),
            strict=True,
        )
        # queries first: when a class has used up its rows, its former queries come again before its former support
        return tuple(_episode(self._pool, classes, rows[..., : self.queries], rows[..., self.queries :]) for classes, rows in by_task)

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


def _episode(
    pool: Pool, classes: Tensor, query: Tensor, labelled: Tensor, present: Tensor | None = None, unlabelled: Tensor | None = None
) -> Episode:
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
    if unlabelled is not None and unlabelled.shape[2]:
        n_unlabelled = n * unlabelled.shape[2]
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


def require_disjoint(first: "Source | EpisodeSampler | SequenceSampler", second: "Source | EpisodeSampler | SequenceSampler") -> None:
    """Refuse two sets, meta-training and test say, that share a class or an image.

    A class is a label of one untouched source, so `part`, which splits the rows of every class, does not make two sets disjoint.

    Raises:
        DataError: with the first classes that both have, or the number of images that stand in both, turned or not.
    """
    for one in _sources(first):
        for other in _sources(second):
            in_both = torch.isin(class_ids(one), class_ids(other))
            shared = [one.class_names[label] for label in torch.tensor(one.classes)[in_both].tolist()]
            if shared:
                raise DataError(
                    f"'{one.name}' and '{other.name}' share {len(shared)} classes (first three: {shared[:3]}); "
                    f"select classes of the source so that none is in both."
                )
            n_images = int(torch.isin(origins(one.ids), origins(other.ids)).sum())
            if n_images:
                raise DataError(f"{n_images} images of '{one.name}' stand in '{other.name}' too, turned; select classes before turning.")


def _sources(of: "Source | EpisodeSampler | SequenceSampler") -> tuple[Source, ...]:
    if isinstance(of, Source):
        return (of,)
    return of.sources if isinstance(of, SequenceSampler) else (of.source,)


def _require_counts(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise SettingError(f"{name}: {value}; give 1 or more.")


def _bounds(name: str, value: Range) -> tuple[int, int]:
    bounds = (value, value) if isinstance(value, int) else tuple(value)
    if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
        raise SettingError(f"{name}: {value}; give a number from 1, or a range (low, high) from 1 with low no larger than high.")
    return bounds


def _number(bounds: tuple[int, int], draw: Generator) -> int:
    return bounds[0] if bounds[0] == bounds[1] else int(torch.randint(bounds[0], bounds[1] + 1, (), generator=draw))
