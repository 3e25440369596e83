"""Intervals over seeds, and over facts within seeds; correlations with a third quantity taken out."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import ConstantInputWarning, pearsonr, rankdata
from scipy.stats import t as student

from remanence.errors import DataError, SettingError

_Array = npt.NDArray[Any]


class Interval(NamedTuple):
    """A mean (or another statistic) and its 95 % interval; NaN bounds where one value stands alone."""

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


def cluster_bootstrap(
    columns: npt.ArrayLike | tuple[npt.ArrayLike, ...],
    seeds: npt.ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    strata: npt.ArrayLike | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic over facts of several seeds, and its 95 % percentile interval.

    Resamples draw seeds with replacement, then facts with replacement within each seed drawn. Rows are facts: what was measured on a
    fact's prefixes is one number by then, because prefixes of one fact are not independent.

        cluster_bootstrap(table["priming_median"], table["seed"], np.median)
        cluster_bootstrap((x, y), seeds, lambda x, y: spearmanr(x, y).statistic)
        cluster_bootstrap((values, kinds), seeds, lambda v, k: np.median(v[k == "a"]) - np.median(v[k == "b"]), strata=kinds)

    Args:
        columns: (n,) values, or a tuple of columns of n values each, numbers or labels. Rows with a NaN are left out.
        seeds: (n,) labels of the outer level.
        statistic: takes as many arrays as there are columns -> a number. One that takes `axis` (np.mean, np.median) is given all
            resamples at once where all seeds have equally many facts.
        strata: (n,) labels; facts are drawn within each, so that every resample has as many of each kind as the data.
        n_resamples: more of them make the bounds steadier.
        seed: of the resampling; the interval is a pure function of the arguments.

    Returns:
        The statistic of the data, its bounds, and the number of rows. Bounds are NaN with fewer than two rows, or where more than 5 % of
        resamples have no statistic (constant columns under a correlation). With one seed only the facts are resampled.

    Raises:
        DataError: columns differ in length.
        SettingError: `n_resamples` is below 1.

    Source: Davison & Hinkley 1997, section 3.8 (two-stage resampling with replacement).

    Example:
        >>> found = cluster_bootstrap([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1])
        >>> found.mean, found.low >= 1.0, found.high <= 4.0
        (2.5, True, True)
    """
    if n_resamples < 1:
        raise SettingError(f"n_resamples={n_resamples}; give 1 or more, 2000 for a steady interval.")
    given = [np.asarray(column) for column in (columns if isinstance(columns, tuple) else (columns,))]
    labels = [np.asarray(seeds), *([] if strata is None else [np.asarray(strata)])]
    lengths = [array.shape for array in (*given, *labels)]
    if len(set(lengths)) > 1 or given[0].ndim != 1:
        raise DataError(f"columns, seeds and strata must be of one length; got shapes {lengths}. Give one value for each fact.")
    kept = ~np.logical_or.reduce([_missing(column) for column in given])
    data, labels = [column[kept] for column in given], [array[kept] for array in labels]
    n = int(kept.sum())
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)  # a resample may draw one fact throughout
        value = float(statistic(*data))
        if n == 1:
            return Interval(value, np.nan, np.nan, 1)
        found = _resampled(data, statistic, *_draws(labels, n_resamples, np.random.default_rng(seed)))
    defined = found[~np.isnan(found)]
    if len(defined) < 0.95 * n_resamples:
        return Interval(value, np.nan, np.nan, n)
    low, high = np.percentile(defined, (2.5, 97.5))
    return Interval(value, float(low), float(high), n)


def _missing(column: _Array) -> _Array:
    return np.isnan(column) if column.dtype.kind == "f" else np.zeros(len(column), dtype=bool)


def _draws(labels: list[_Array], n_resamples: int, rng: np.random.Generator) -> tuple[_Array, _Array]:
    """(R, W) row numbers of each resample, and which of them count: seeds differ in how many facts they have."""
    codes = [np.unique(array, return_inverse=True)[1] for array in labels]
    strata = codes[1] if len(codes) > 1 else np.zeros_like(codes[0])
    n_seeds = codes[0].max() + 1
    drawn = rng.integers(n_seeds, size=(n_resamples, n_seeds))
    rows, counts = [], []
    for stratum in range(strata.max() + 1):
        members = [np.flatnonzero((codes[0] == one) & (strata == stratum)) for one in range(n_seeds)]
        sizes = np.array([len(each) for each in members])
        table = np.zeros((n_seeds, sizes.max()), dtype=np.int64)
        for one, each in enumerate(members):
            table[one, : len(each)] = each
        place = (rng.random((n_resamples, n_seeds, sizes.max())) * sizes[drawn][..., None]).astype(np.int64)
        rows.append(table[drawn[..., None], place].reshape(n_resamples, -1))
        counts.append((np.arange(sizes.max()) < sizes[drawn][..., None]).reshape(n_resamples, -1))
    return np.concatenate(rows, axis=1), np.concatenate(counts, axis=1)


def _resampled(columns: list[_Array], statistic: Callable[..., Any], rows: _Array, counts: _Array) -> _Array:
    if counts.all() and _takes_axis(statistic):
        return np.asarray(statistic(*(column[rows] for column in columns), axis=1), dtype=np.float64)
    found = np.full(len(rows), np.nan)
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        chosen = row[count]
        if len(chosen):
            found[index] = statistic(*(column[chosen] for column in columns))
    return found


def _takes_axis(statistic: Callable[..., Any]) -> bool:
    try:
        return "axis" in inspect.signature(statistic).parameters
    except ValueError:  # written in C, without a signature
        return False


def partial_spearman(x: npt.ArrayLike, y: npt.ArrayLike, z: npt.ArrayLike) -> float:
    """Spearman's correlation of two quantities with what both share with a third taken out.

    Args:
        x, y: (n,) numbers.
        z: (n,), or (n, C) for several quantities to be taken out. Rows with a NaN in any of the three are left out.

    Returns:
        The correlation of what a linear fit on the ranks of `z` leaves of the ranks of `x` and `y`, in [-1, 1]; for one z equal to
        (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)). NaN with fewer than C + 3 rows, or where nothing is left.

    Raises:
        DataError: lengths differ.

    Source: the partial correlation of Yule 1907, of ranks.

    Example:
        >>> round(partial_spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4], [2, 1, 3, 5, 4]), 3)
        0.56
    """
    first, second, third = (np.asarray(values, np.float64) for values in (x, y, z))
    third = third[:, None] if third.ndim == 1 else third
    if not (first.shape == second.shape == third.shape[:1]):
        raise DataError(f"x, y and z of shapes {first.shape}, {second.shape} and {third.shape}; give as many rows of each.")
    table = np.column_stack([first, second, third])
    table = table[~np.isnan(table).any(axis=1)]
    if len(table) < table.shape[1] + 1:
        return np.nan
    ranks = rankdata(table, axis=0)
    ranks -= ranks.mean(axis=0)
    left = ranks[:, :2] - ranks[:, 2:] @ np.linalg.lstsq(ranks[:, 2:], ranks[:, :2], rcond=None)[0]
    if (np.abs(left).max(axis=0) < 1e-9 * len(table)).any():
        return np.nan
    return float(pearsonr(left[:, 0], left[:, 1]).statistic)
