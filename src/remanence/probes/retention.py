"""How long what was learned lasts: retention over clean steps, and its half-life.

    rho = retention(log_p, control_log_p, log_p_before)      # (F, K)
    half_life([0, 1, 2, 5, 10, 20, 50], rho)                 # (F,) steps

Clean steps are those after the last exposure. Every curve is compared with that of a paired control run (same seed, same batches, the
fact's row replaced by the row that would have been there), so that what all training does to a keyword is no retention. The same
functions serve priming: give the priming medians of both runs in place of log-probabilities.

Axes: F facts; K grid points, the first at k = 0, right after the last exposure.
"""

import numpy as np
import numpy.typing as npt

from remanence.errors import DataError

Array = npt.NDArray[np.float64]

LEAST_GAIN = float(np.log(2.0))
"""Nats by which a fact must lie above its control at k = 0 to count as learned: twice as probable."""
KNOWN = 0.5
"""Probability before training above which there was nothing to learn."""


def retention(log_p: npt.ArrayLike, control_log_p: npt.ArrayLike, log_p_before: npt.ArrayLike | None = None) -> Array:
    """The share of what exposures brought that is still there after k clean steps.

    rho(k) = (l_k - c_k) / (l_0 - c_0), with l the run's curve and c its control's. Above 1 where the fact still grows, below 0 where it
    falls under its control.

    Args:
        log_p: (F, K) or (K,), nats, of the run with exposures.
        control_log_p: the same of the paired control run, on the same grid.
        log_p_before: (F,), or one number for (K,), nats: before training. Facts that were known then (P above 0.5) are not counted.

    Returns:
        As `log_p`, float64. NaN over a whole curve, "not learned", where l_0 - c_0 is below log 2 or the fact was known before.

    Raises:
        DataError: shapes disagree, or there is no grid point.

    Source: ours.

    Example:
        >>> retention([[-1.0, -2.0], [-5.0, -5.0]], [[-5.0, -5.0], [-5.0, -5.0]])
        array([[1.  , 0.75],
               [ nan,  nan]])
    """
    curves, controls = np.asarray(log_p, np.float64), np.asarray(control_log_p, np.float64)
    if curves.shape != controls.shape or curves.ndim not in (1, 2) or curves.shape[-1] == 0:
        raise DataError(
            f"curves of shape {curves.shape} and controls of shape {controls.shape}; give both as (facts, steps) on one grid, k = 0 first."
        )
    gain = curves - controls
    is_learned = gain[..., :1] >= LEAST_GAIN
    if log_p_before is not None:
        before = np.asarray(log_p_before, np.float64)
        if before.shape != curves.shape[:-1]:
            raise DataError(f"log_p_before of shape {before.shape}, but {curves.shape[:-1]} curves; give one number for each.")
        is_learned &= before[..., None] <= np.log(KNOWN)
    return np.divide(gain, gain[..., :1], out=np.full_like(gain, np.nan), where=np.broadcast_to(is_learned, gain.shape))


def half_life(steps: npt.ArrayLike, rho: npt.ArrayLike) -> Array:
    """The number of clean steps after which less than half is left.

    The first k at which the running minimum of a curve falls below 1/2, linear in log k between grid points; between k = 0 and the
    point after it, where log k has no lower end, linear in k.

    Args:
        steps: (K,) ascending, 0 or more.
        rho: (F, K) or (K,) from `retention`.

    Returns:
        (F,), or an array without axes for (K,). Infinite where the curve never falls so low (censored: longer than steps[-1]); NaN where
        a curve holds a NaN (not learned, or not measured throughout).

    Raises:
        DataError: steps do not ascend, or their number is not that of the curves' points.

    Example:
        >>> float(half_life([0, 10, 1000], [1.0, 0.75, 0.25]))
        100.0
    """
    grid, curves = np.asarray(steps, np.float64), np.asarray(rho, np.float64)
    if grid.ndim != 1 or curves.ndim not in (1, 2) or curves.shape[-1] != len(grid) or not len(grid):
        raise DataError(f"{grid.shape} steps for curves of shape {curves.shape}; give one step for each point, (K,) and (F, K).")
    if grid[0] < 0 or (np.diff(grid) <= 0).any():
        raise DataError(f"steps {grid[:8].tolist()} must begin at 0 or above and ascend; sort the grid and drop what occurs twice.")
    rows = np.atleast_2d(curves)
    lowest = np.minimum.accumulate(rows, axis=1)
    below = lowest < 0.5
    last = below.argmax(axis=1)  # of a boolean row: the first True
    first, each = np.maximum(last - 1, 0), np.arange(len(rows))
    above = lowest[each, first]
    fall = above - lowest[each, last]
    share = np.divide(above - 0.5, fall, out=np.ones_like(fall), where=fall > 0)
    found = np.where(below.any(axis=1), _between(grid[first], grid[last], share), np.inf)
    return np.where(np.isnan(rows).any(axis=1), np.nan, found).reshape(curves.shape[:-1])


def _between(start: Array, end: Array, share: Array) -> Array:
    """The point at `share` of the way from start to end, on a log axis where there is one."""
    ratio = np.divide(end, start, out=np.ones_like(end), where=start > 0)
    return np.where(start > 0, start * ratio**share, end * share)
