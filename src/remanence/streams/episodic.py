"""Few-shot episodes: many small independent tasks drawn from one source."""

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.keys import generator
from remanence.streams._cut import CutStream
from remanence.streams.source import Source, rows_by_value
from remanence.task import Event, Task


def episodes(
    source: Source,
    ways: int = 5,
    shots: int | list[int] = 1,
    queries: int = 5,
    n: int = 100,
    order_seed: int = 0,
    shots_range: tuple[int, int] | None = None,
) -> CutStream:
    """Few-shot episodes: each is a task of a few classes with a few examples, learned from the base state.

    The support set is the task's train set, the query set its test set; both are drawn, without overlap, from all rows
    of a class, so generalisation is to other classes: give a source whose classes no meta-training saw. Labels stay
    the source's. Episode i is a pure function of (order_seed, i), and none is built before it is asked for.

    Args:
        source: what the episodes are drawn from.
        ways: classes per episode.
        shots: train examples per class; a list of `ways` numbers makes them differ (the first number goes to the
            first class drawn).
        queries: test examples per class.
        n: how many episodes.
        order_seed: what they are drawn from.
        shots_range: (low, high), both included: draw each class's shots anew; leave `shots` at 1 then.

    Raises:
        SettingError: a number out of range, more ways than classes, a list of shots of another length, `shots` beside
            `shots_range`.
        DataError: a class has fewer rows than shots and queries together.

    Source: Vinyals et al. 2016 (arXiv 1606.04080); ranges of shots as in Triantafillou et al. 2020 (arXiv 1903.03096).

    Example:
        >>> from remanence.streams import digits
        >>> stream = episodes(digits(), ways=3, shots=[1, 2, 3], n=1_000_000)
        >>> task = stream[999_999].task
        >>> len(stream), task.name, len(task.train), len(task.test)
        (1000000, 'episode 999999', 6, 15)
    """
    for setting, value in (("ways", ways), ("queries", queries), ("n", n)):
        if value < 1:
            raise SettingError(f"{setting}: {value}; give 1 or more.")
    low, high = _shot_bounds(shots, shots_range, ways)
    if ways > len(source.classes):
        raise SettingError(f"ways: {ways} classes an episode, but '{source.name}' has {len(source.classes)} only.")
    return _Episodes(source, ways, low, high, queries, n, order_seed)


def _shot_bounds(shots: int | list[int], shots_range: tuple[int, int] | None, ways: int) -> tuple[list[int], list[int]]:
    """The least and the most shots of each way."""
    if shots_range is None:
        low = [shots] * ways if isinstance(shots, int) else list(shots)
        high = low
    elif shots != 1:
        raise SettingError(f"shots: {shots} and shots_range: {tuple(shots_range)} contradict each other; give one of them.")
    elif len(shots_range) != 2 or shots_range[0] > shots_range[1]:
        raise SettingError(f"shots_range: {tuple(shots_range)}; give the least and the most, in this order.")
    else:
        low, high = [shots_range[0]] * ways, [shots_range[1]] * ways
    if len(low) != ways:
        raise SettingError(f"shots: {len(low)} numbers for {ways} ways; give one number, or one per way.")
    if min(low) < 1:
        raise SettingError(f"shots: {min(low)}; every class needs 1 or more.")
    return low, high


class _Episodes(CutStream):
    def __init__(self, source: Source, ways: int, low: list[int], high: list[int], queries: int, n: int, order_seed: int) -> None:
        words = f"{min(low)}" if min(low) == max(high) else f"{min(low)}-{max(high)}"
        super().__init__(f"{source.name}, {ways}-way {words}-shot", [source, ways, low, high, queries, n, order_seed], "independent")
        self._source, self._low, self._high = source, low, high
        self._queries, self._n, self._order_seed = queries, n, order_seed
        self._rows = list(rows_by_value(source.labels).items())
        needed = max(high) + queries
        short = [source.class_names[label] for label, rows in self._rows if len(rows) < needed]
        if short:
            raise DataError(
                f"{len(short)} of {len(self._rows)} classes of '{source.name}' have fewer than {needed} rows, which {max(high)} shots and "
                f"{queries} queries need (first three: {short[:3]}); ask for fewer, or leave these classes out with select()."
            )

    def __len__(self) -> int:
        return self._n

    @property
    def subjects(self) -> tuple[Task, ...]:
        """None: there may be millions, and each is measured when it is learned."""
        return ()

    def event(self, index: int) -> Event:
        return self.build(index)  # not kept: there may be millions

    def build(self, index: int) -> Event:
        draw = generator("episode", self._order_seed, index)
        support: list[Tensor] = []
        query: list[Tensor] = []
        chosen = torch.randperm(len(self._rows), generator=draw)[: len(self._low)].tolist()
        for place, low, high in zip(chosen, self._low, self._high, strict=True):
            n_shots = low if low == high else int(torch.randint(low, high + 1, (), generator=draw))
            rows = self._rows[place][1]
            rows = rows[torch.randperm(len(rows), generator=draw)[: n_shots + self._queries]]
            support.append(rows[:n_shots])
            query.append(rows[n_shots:])
        data = self._source.data
        return Event("learn", Task(f"episode {index}", data(torch.cat(support)), data(torch.cat(query))))
