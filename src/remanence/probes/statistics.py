"""Intervals over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Interval(NamedTuple):
    """A mean and its 95 % interval by Student's t; NaN bounds where one value stands alone."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """The mean over seeds and where it lies with 95 % confidence; values that are NaN are left out.

    Source: Student 1908; two-sided, n - 1 degrees of freedom.

    Example:
        >>> [round(float(value), 3) for value in interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484, 3.0]
    """
    kept = np.array([value for value in values if not np.isnan(value)], dtype=np.float64)
    if not len(kept):
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(kept.mean())
    if len(kept) == 1:
        return Interval(mean, np.nan, np.nan, 1)
    half = float(student.ppf(0.975, len(kept) - 1) * kept.std(ddof=1) / np.sqrt(len(kept)))
    return Interval(mean, mean - half, mean + half, len(kept))
