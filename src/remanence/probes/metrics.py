"""Continual-learning metrics: pure functions of an accuracy matrix, so that a ledger can always be read again.

Three libraries mean three things by "forgetting"; all three stand here under names of their own.

Axes: T learn events, S subjects. `values[t, s]` is the accuracy on subject s after learn event t; `learned[t, s]` says
whether event t taught s. In the classic square case event t teaches subject t alone and `learned` is the identity;
an online stream teaches one subject in several events, a joint stream teaches all in one. Where the square definition
speaks of A[j, j], the row of the *last* event that taught j is read.

A run that broke off leaves missing cells (NaN): every metric reads the complete rows before the first missing cell.
What is not defined is NaN with a reason, never 0.

Example:
    >>> import numpy as np
    >>> A = np.array([[0.9, 0.0], [0.5, 0.8]])
    >>> round(forgetting_first(A, np.eye(2, dtype=bool)).value, 6)
    0.4
    >>> forgetting_first(A[:1], np.eye(2, dtype=bool)[:1])
    Result(value=nan, reason='one learn event only: nothing was learned afterwards')
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remanence.errors import DataError

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]

_ALONE = "one learn event only: nothing was learned afterwards"
_EMPTY = "no learn event was measured completely"


class Result(NamedTuple):
    """A metric's value; NaN comes with the reason."""

    value: float
    reason: str = ""


def complete_prefix(values: Values, learned: Mask) -> tuple[Values, Mask]:
    """The rows before the first missing cell.

    Args:
        values: (T, S) accuracies, NaN where nothing was measured.
        learned: (T, S) which event taught which subject.

    Raises:
        DataError: the two shapes differ or are not two-dimensional.
    """
    if values.ndim != 2 or values.shape != learned.shape:
        raise DataError(f"values and learned must both be (T, S); got {values.shape} and {learned.shape}.")
    missing = np.isnan(values).any(axis=1)
    rows = int(missing.argmax()) if missing.any() else len(values)
    return values[:rows], learned[:rows]


def first_event(learned: Mask) -> NDArray[np.int64]:
    """(S,) the first event that taught each subject; -1 for a subject that was never taught."""
    return np.where(learned.any(axis=0), learned.argmax(axis=0), -1) if len(learned) else np.full(learned.shape[1], -1)


def last_event(learned: Mask) -> NDArray[np.int64]:
    """(S,) the last event that taught each subject; -1 for a subject that was never taught."""
    if not len(learned):
        return np.full(learned.shape[1], -1)
    return np.where(learned.any(axis=0), len(learned) - 1 - learned[::-1].argmax(axis=0), -1)


def average_accuracy(values: Values, learned: Mask) -> Result:
    """Mean over the taught subjects of the last row: (1/T) sum_j A[T-1, j].

    Source: Lopez-Paz & Ranzato 2017 (GEM), "average accuracy".
    """
    values, learned = complete_prefix(values, learned)
    return _mean(values[-1][learned.any(axis=0)], _EMPTY) if len(values) else Result(np.nan, _EMPTY)


def average_incremental_accuracy(seen: Values) -> Result:
    """Mean over learn events of the accuracy on everything known by then: (1/T) sum_t a_t.

    Args:
        seen: (T,) a_t, accuracy over all test examples of classes known after event t, by example; see
            `accuracy_on_seen` where it was not recorded.

    Source: Rebuffi et al. 2017 (iCaRL); LAMDA-PILOT's "Average Accuracy (CNN)".
    """
    missing = np.isnan(seen)
    return _mean(seen[: missing.argmax()] if missing.any() else seen, _EMPTY)


def accuracy_on_seen(values: Values, learned: Mask) -> Values:
    """(T,) a_t from the matrix alone: the mean over subjects taught by then, every subject counting once."""
    values, learned = complete_prefix(values, learned)
    taught = np.logical_or.accumulate(learned, axis=0)
    return np.array([row[known].mean() if known.any() else np.nan for row, known in zip(values, taught, strict=True)])


def forgetting_max(values: Values, learned: Mask) -> Result:
    """Best accuracy ever before the last event, minus the final one: mean_{j<T-1} (max_{t<T-1} A[t, j] - A[T-1, j]).

    Negative when a task gained. aimagelab/mammoth takes the maximum over all t, the last included, and so is never negative.

    Source: Chaudhry et al. 2018 (arXiv 1801.10112), equation 3.
    """
    values, learned = complete_prefix(values, learned)
    old = _old(learned)
    return _mean(values[:-1, old].max(axis=0) - values[-1, old], _ALONE) if old.any() else Result(np.nan, _why_no_old(values))


def forgetting_first(values: Values, learned: Mask) -> Result:
    """Accuracy right after learning, minus the final one: mean_{j<T-1} (A[j, j] - A[T-1, j]).

    Source: ContinualAI/avalanche, `forgetting_bwt.py`; the negative of backward transfer.
    """
    values, learned = complete_prefix(values, learned)
    old = _old(learned)
    if not old.any():
        return Result(np.nan, _why_no_old(values))
    return _mean(values[last_event(learned)[old], np.flatnonzero(old)] - values[-1, old], _ALONE)


def backward_transfer(values: Values, learned: Mask) -> Result:
    """What later learning gave to earlier tasks: mean_{j<T-1} (A[T-1, j] - A[j, j]).

    Source: Lopez-Paz & Ranzato 2017 (GEM), equation 3.
    """
    result = forgetting_first(values, learned)
    return Result(0.0 - result.value, result.reason)


def forgetting_step(values: Values, learned: Mask) -> Result:
    """Loss from one event to the next: mean over t >= 1 of (1/t) sum_{i<t} (A[t-1, i] - A[t, i]).

    Its numbers are much smaller than those of the other two: each event counts only what it took itself.

    Source: GT-RIPL/CODA-Prompt (Smith et al. 2023), `calc_forgetting.py`.
    """
    result = interference(values, learned)
    return Result(0.0 - result.value, result.reason)


def interference(values: Values, learned: Mask) -> Result:
    """What an event does to what it does not teach: mean over events t of the mean change A[t, j] - A[t-1, j].

    j runs over subjects that were taught before t and are not taught at t. Negative: learning disturbs. At event ends
    it is the negative of `forgetting_step`.

    Source: ours, after the stepwise forgetting of CODA-Prompt.
    """
    values, learned = complete_prefix(values, learned)
    changes = []
    for t in range(1, len(values)):
        others = learned[:t].any(axis=0) & ~learned[t]
        if others.any():
            changes.append(float((values[t] - values[t - 1])[others].mean()))
    return _mean(np.array(changes), _why_no_old(values))


def forward_transfer(values: Values, learned: Mask, before: Values) -> Result:
    """What earlier learning gave to tasks not yet learned: mean_{j>=1} (A[j-1, j] - b_j).

    Args:
        values: (T, S) accuracies.
        learned: (T, S) which event taught which subject.
        before: (S,) b_j, the accuracy before the first event; NaN where it was not measured.

    Source: Lopez-Paz & Ranzato 2017 (GEM), equation 4.
    """
    values, learned = complete_prefix(values, learned)
    first = first_event(learned)
    later = first >= 1
    if not later.any():
        return Result(np.nan, "no task waited while another was learned" if len(values) else _EMPTY)
    if np.isnan(before[later]).any():
        return Result(np.nan, "accuracy before the first event was not measured")
    return _mean(values[first[later] - 1, np.flatnonzero(later)] - before[later], _EMPTY)


def learning_accuracy(values: Values, learned: Mask) -> Result:
    """Accuracy on each subject right after it was learned: mean_j A[j, j].

    Source: Riemer et al. 2019 (MER), "learning accuracy".
    """
    diagonal = _diagonal(values, learned)
    return _mean(diagonal[~np.isnan(diagonal)], _EMPTY)


def plasticity(values: Values, learned: Mask, alone: Values) -> Result:
    """What having learned other things costs the new one: mean_j (A[j, j] - s_j).

    Args:
        values: (T, S) accuracies.
        learned: (T, S) which event taught which subject.
        alone: (S,) s_j, accuracy of the same learner that learned j alone; NaN where there is none.

    Source: Chaudhry et al. 2018, equation 5 (intransigence), with the sign turned: below 0 means less plastic.
    """
    gain = _diagonal(values, learned) - alone
    return _mean(gain[~np.isnan(gain)], "no subject was also learned alone")


def _diagonal(values: Values, learned: Mask) -> Values:
    values, learned = complete_prefix(values, learned)
    last = last_event(learned)
    return np.array([values[t, s] if t >= 0 else np.nan for s, t in enumerate(last)])


def _old(learned: Mask) -> Mask:
    """Subjects that were taught, and not by the last event."""
    last = last_event(learned)
    return (last >= 0) & (last < len(learned) - 1)


def _why_no_old(values: Values) -> str:
    if not len(values):
        return _EMPTY
    return _ALONE if len(values) == 1 else "every event taught all that was known: nothing could be disturbed"


def _mean(parts: Values, reason: str) -> Result:
    return Result(float(parts.mean())) if len(parts) else Result(np.nan, reason)
