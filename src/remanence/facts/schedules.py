"""At which training steps a fact is shown: pure functions of the step, so that a resumed run needs the step only.

    schedule = Spaced(every=20, times=3)
    [step for step in range(100) if schedule.exposures(step)]  # [0, 20, 40]

Steps are optimizer steps counted from 0; an exposure is one row of a step's batch that holds the fact. All schedules
spend their `times` exposures and then stay silent; `times=0` shows nothing, which makes a control run.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from remanence.errors import SettingError
from remanence.keys import generator

__all__ = ["Expanding", "Massed", "Poisson", "Schedule", "Spaced"]

_LAST_STEP = 10**12
"""No training goes on for longer: a schedule that does is a mistyped setting."""


class Schedule(Protocol):
    """What the injector asks of a schedule; any object with these three will do."""

    def exposures(self, step: int) -> int:
        """How many rows of this step's batch show the fact; 0 (false) where none does."""

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that show the fact, ascending, each once."""

    @property
    def last(self) -> int | None:
        """The last of `steps`; None where there is none."""


class _Listed(ABC):
    """A schedule given by the list of its steps, one exposure each."""

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The steps that show the fact, ascending, each once."""

    @property
    def last(self) -> int | None:
        """The last of `steps`; None where there is none."""
        return self.steps[-1] if self.steps else None

    @cached_property
    def _shown(self) -> frozenset[int]:
        return frozenset(self.steps)

    def exposures(self, step: int) -> int:
        """How many rows of this step's batch show the fact: 0 or 1."""
        return int(step in self._shown)


@dataclass(frozen=True)
class Spaced(_Listed):
    """One exposure every `every` steps.

    Args:
        every: steps from one exposure to the next, 1 or more; 1 shows the fact in consecutive batches.
        times: exposures, 0 or more.
        start: the first exposure's step, 0 or more.

    Raises:
        SettingError: a setting is out of range.

    Source: Sun et al. 2025 (arXiv 2504.09522): one row of 20 consecutive minibatches, and spacings up to 50 minibatches.

    Example:
        >>> Spaced(every=20, times=3).steps
        (0, 20, 40)
    """

    every: int = 1
    times: int = 20
    start: int = 0

    def __post_init__(self) -> None:
        _check_counts(every=(self.every, 1), times=(self.times, 0), start=(self.start, 0))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that show the fact, ascending."""
        return tuple(range(self.start, self.start + self.every * self.times, self.every))


@dataclass(frozen=True)
class Massed:
    """A burst: all exposures in as few batches as possible, several rows of one batch.

    `Spaced(every=1)` is already the closest spacing with one row a batch; what remains to be massed is the batch itself. The
    optimizer then sees one gradient with the fact `per_step` times in it, in place of `per_step` steps.

    Args:
        times: exposures, 0 or more.
        start: the first exposure's step, 0 or more.
        per_step: rows of one batch that show the fact, 1 or more; None: all `times` of them. Set it when the batch is
            smaller than `times` rows, or when a batch should keep rows of its own.

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> burst = Massed(times=20, per_step=8)
        >>> burst.steps, [burst.exposures(step) for step in burst.steps]
        ((0, 1, 2), [8, 8, 4])
    """

    times: int = 20
    start: int = 0
    per_step: int | None = None

    def __post_init__(self) -> None:
        per_step = 1 if self.per_step is None else self.per_step
        _check_counts(times=(self.times, 0), start=(self.start, 0), per_step=(per_step, 1))

    @property
    def _rows(self) -> int:
        return self.per_step or max(1, self.times)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that show the fact, ascending, each once."""
        return tuple(range(self.start, self.start - (-self.times // self._rows)))

    @property
    def last(self) -> int | None:
        """The last of `steps`; None where there is none."""
        return self.steps[-1] if self.times else None

    def exposures(self, step: int) -> int:
        """How many rows of this step's batch show the fact."""
        spent = (step - self.start) * self._rows
        return 0 if spent < 0 else max(0, min(self._rows, self.times - spent))


@dataclass(frozen=True)
class Expanding(_Listed):
    """Gaps that grow: `base` steps, then `base * factor`, `base * factor**2`, ..., each rounded down.

    Args:
        base: the first gap in steps, 1 or more.
        factor: by how much each gap exceeds the one before it, 1 or more; 1 is `Spaced(every=base)`.
        times: exposures, 0 or more. 8 with the other defaults end at step 127; every further one doubles that.
        start: the first exposure's step, 0 or more.

    Raises:
        SettingError: a setting is out of range, or the last exposure lies beyond step 10**12.

    Source: Landauer and Bjork 1978 (expanding rehearsal).

    Example:
        >>> Expanding(times=5).steps
        (0, 1, 3, 7, 15)
    """

    base: int = 1
    factor: float = 2.0
    times: int = 8
    start: int = 0

    def __post_init__(self) -> None:
        _check_counts(base=(self.base, 1), times=(self.times, 0), start=(self.start, 0))
        if not 1 <= self.factor < math.inf:
            raise SettingError(f"factor: {self.factor}; gaps grow or stay, so give a finite factor of 1 or more.")
        if self.times > 1 and math.log(self.base) + (self.times - 2) * math.log(self.factor) > math.log(_LAST_STEP):
            raise SettingError(
                f"base {self.base}, factor {self.factor}, times {self.times}: the last gap exceeds {_LAST_STEP:.0e} steps; "
                f"lower factor or times."
            )

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that show the fact, ascending."""
        steps = [self.start] * min(1, self.times)
        for index in range(self.times - 1):
            steps.append(steps[-1] + int(self.base * self.factor**index))
        return tuple(steps)


@dataclass(frozen=True)
class Poisson(_Listed):
    """Exposures at random: from `start` on each step shows the fact with probability `rate`, until `times` are spent.

    The Poisson process of discrete time: gaps are geometric with mean 1 / rate, and no step shows the fact twice.

    Args:
        rate: exposures a step, in (0, 1].
        times: exposures, 0 or more.
        seed: of the draw; the same seed gives the same steps in every process.
        start: the first step that may show the fact, 0 or more.

    Raises:
        SettingError: a setting is out of range, or the exposures reach beyond step 10**12.

    Example:
        >>> Poisson(rate=1.0, times=3, start=5).steps
        (5, 6, 7)
    """

    rate: float
    times: int
    seed: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise SettingError(f"rate: {self.rate} exposures a step; give a number in (0, 1].")
        _check_counts(times=(self.times, 0), start=(self.start, 0))
        if self.times / self.rate > _LAST_STEP:
            raise SettingError(f"rate {self.rate}, times {self.times}: the exposures end beyond {_LAST_STEP:.0e} steps; raise rate.")

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that show the fact, ascending."""
        uniform = torch.rand(self.times, dtype=torch.float64, generator=generator(self.seed, "poisson schedule"))
        # the inverse of the geometric distribution; a rate of 1 divides by -inf, and every gap is 1
        gaps = 1 + torch.floor(torch.log1p(-uniform) / torch.log1p(torch.tensor(-self.rate, dtype=torch.float64)))
        return tuple((self.start - 1 + gaps.to(torch.int64).cumsum(0)).tolist())


def _check_counts(**settings: tuple[int, int]) -> None:
    """Name -> (value, least value allowed)."""
    for name, (value, least) in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"{name}: {value!r}; give a whole number of {least} or more.")
