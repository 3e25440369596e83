"""From what an untouched model thinks of a fact to how strongly the fact will prime, with an interval, and the check afterwards.

Three things over tables with one row a fact:

- `PrimingForecast` is a line through measured facts: priming_median on log_p_before (nats) and context_loss (nats a token). The second
  covariate is needed: scrambled texts have the lowest keyword probability and yet prime little, because nothing in them is fluent.
- `check_forecast` says how often the intervals held and whether the order was right.
- `calibrate` fits where the relation bends. The published threshold of 1e-3 came without a test or an interval; this one has an interval.

    known = PrimingForecast.fit(forecast(model, facts, tokenizer).merge(measured, on=["fact", "theme", "kind"]))
    print(known.predict(forecast(model, new_facts, tokenizer)))

Axes: N facts, P coefficients, R resamples, K candidate knees.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.probes.statistics import cluster_bootstrap

COVARIATES = ("log_p_before", "context_loss")
RESPONSE = "priming_median"
MIN_FACTS, MIN_FACTS_KNEE = 8, 24
_N_CANDIDATES = 64

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PrimingForecast:
    """A fitted forecast of priming; make it with `fit`, keep it with `to_json`.

    Args:
        intercept: priming_median in nats where both covariates are 0.
        slopes: nats of priming per nat of log_p_before (negative: what is improbable primes) and per nat a token of context_loss.
        inverse: (P, P) inverse of the normal equations' matrix, rows first; widens intervals away from the facts seen.
        residual: standard deviation of what the line leaves, nats; N - P degrees of freedom.
        n: facts in the fit.
        source: what it was fitted on, in words; shown to the user of a forecast that was shipped.

    Source: Sun et al. 2025 (arXiv 2504.09522) for log_p_before; ours: the fluency covariate, the line and its interval.
    """

    intercept: float
    slopes: tuple[float, float]
    inverse: tuple[tuple[float, ...], ...]
    residual: float
    n: int
    source: str = ""

    @classmethod
    def fit(cls, table: pd.DataFrame, source: str = "") -> "PrimingForecast":
        """Ordinary least squares over facts.

        Args:
            table: one row a fact with log_p_before, context_loss and priming_median; rows with a missing value are left out.
            source: what the table was measured on.

        Raises:
            DataError: a column is absent, fewer than eight facts remain, or a covariate is the same for all of them.
        """
        kept = _whole_rows(table, (*COVARIATES, RESPONSE), MIN_FACTS, "a forecast")
        design, response = _design(kept), kept[RESPONSE].to_numpy(np.float64)
        if np.linalg.matrix_rank(design) < design.shape[1]:
            raise DataError(
                f"the {len(kept)} facts do not tell log_p_before and context_loss apart (one is constant or follows from the other); "
                f"add facts of other kinds."
            )
        inverse = np.linalg.inv(design.T @ design)
        weights = inverse @ design.T @ response
        rest = response - design @ weights
        residual = float(np.sqrt(rest @ rest / (len(kept) - design.shape[1])))
        rows = tuple(tuple(map(float, row)) for row in inverse)
        return cls(float(weights[0]), (float(weights[1]), float(weights[2])), rows, residual, len(kept), source)

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        """Priming of facts that were not injected yet.

        The interval is Student's 95 % prediction interval of least squares: it holds for one new fact drawn like those of the fit, its
        residuals taken as normal and of one size. Another model, rate or schedule than that of the fit voids it; `check_forecast` shows
        by how much.

        Args:
            table: one row a fact with log_p_before and context_loss, as `forecast` gives it.

        Returns:
            A copy with predicted, predicted_low and predicted_high, in nats of priming_median; NaN where a covariate is missing.

        Raises:
            DataError: a column is absent.
        """
        _require_columns(table, COVARIATES)
        design = _design(table)
        middle = design @ np.array([self.intercept, *self.slopes])
        leverage = np.einsum("np,pq,nq->n", design, np.array(self.inverse), design)
        half = student.ppf(0.975, self.n - design.shape[1]) * self.residual * np.sqrt(1 + leverage)
        return table.assign(predicted=middle, predicted_low=middle - half, predicted_high=middle + half)

    def to_json(self) -> str:
        """All of it as one line of JSON; `from_json` gives an equal object back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PrimingForecast":
        """What `to_json` wrote.

        Raises:
            StateMismatchError: the text is not a saved forecast.
        """
        try:
            stored = json.loads(text)
            made = cls(**stored | {"slopes": tuple(stored["slopes"]), "inverse": tuple(map(tuple, stored["inverse"]))})
            whole = len(made.slopes) == len(COVARIATES) and np.array(made.inverse, np.float64).shape == (3, 3) and made.n >= MIN_FACTS
        except (TypeError, ValueError, KeyError):
            whole = False
        if not whole:
            names = ", ".join(field.name for field in fields(cls))
            raise StateMismatchError(f"this is not a saved PrimingForecast: {text[:60]!r}. It is JSON with {names}; fit one anew.")
        return made


class ForecastCheck(NamedTuple):
    """How a forecast did.

    Args:
        coverage: share of facts whose measured priming lay in its 95 % interval.
        spearman: rank correlation of predicted and measured priming; NaN where one of them is constant.
        low: lower end of its 95 % interval, bootstrap over facts.
        high: upper end.
        n: facts.
    """

    coverage: float
    spearman: float
    low: float
    high: float
    n: int


def check_forecast(predicted: pd.DataFrame, measured: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> ForecastCheck:
    """Hold a prediction against what training did.

    Args:
        predicted: with fact, predicted, predicted_low, predicted_high, as `PrimingForecast.predict` gives it.
        measured: with fact and priming_median, one row a fact: the last step of `FactTracer.curves`, say.
        n_resamples: of the bootstrap over facts, percentile; see `cluster_bootstrap`.
        seed: of the bootstrap.

    Raises:
        DataError: a column is absent, a fact has several rows, or fewer than three facts stand in both tables.

    Example:
        >>> facts = ["a", "b", "c", "d"]
        >>> said = pd.DataFrame({"fact": facts, "predicted": [0.0, 1, 2, 3], "predicted_low": -1.0, "predicted_high": 2.5})
        >>> check_forecast(said, pd.DataFrame({"fact": facts, "priming_median": [0.1, 0.9, 2.0, 2.6]}))[:2]
        (0.75, 1.0)
    """
    _require_columns(predicted, ("fact", "predicted", "predicted_low", "predicted_high"))
    _require_columns(measured, ("fact", RESPONSE))
    for table in (predicted, measured):
        if table["fact"].duplicated().any():
            raise DataError(f"fact '{table['fact'][table['fact'].duplicated()].iloc[0]}' has several rows; give one step and one run.")
    said = predicted[["fact", "predicted", "predicted_low", "predicted_high"]]
    both = said.merge(measured[["fact", RESPONSE]], on="fact").dropna()
    if len(both) < 3:
        raise DataError(f"{len(both)} facts stand in both tables with all values; a check needs three or more.")
    truth, middle = both[RESPONSE].to_numpy(np.float64), both["predicted"].to_numpy(np.float64)
    covered = (both["predicted_low"].to_numpy() <= truth) & (truth <= both["predicted_high"].to_numpy())
    order = cluster_bootstrap((middle, truth), np.zeros(len(both)), _spearman, n_resamples=n_resamples, seed=seed)
    return ForecastCheck(float(covered.mean()), *order)


def _spearman(first: Array, second: Array, axis: int = -1) -> Array:
    """Rank correlations along an axis; NaN where one side is constant. In one go, where scipy's would take each resample alone."""
    ranks = [rankdata(values, axis=axis) - (values.shape[axis] + 1) / 2 for values in (first, second)]
    size = np.sqrt((ranks[0] ** 2).sum(axis) * (ranks[1] ** 2).sum(axis))
    found: Array = np.divide((ranks[0] * ranks[1]).sum(axis), size, out=np.full(np.shape(size), np.nan), where=size > 0)
    return found


@dataclass(frozen=True)
class Knee:
    """Where priming_median bends as a function of log_p_before.

    Args:
        log_p: place of the bend, nats.
        low: lower end of its 95 % interval, bootstrap over facts.
        high: upper end.
        slope_below: nats of priming per nat of log probability among improbable keywords.
        slope_above: the same among probable ones.
        gain: share of a straight line's squared error that the bend takes away; near 0 there is no bend to speak of.
        n: facts.
    """

    log_p: float
    low: float
    high: float
    slope_below: float
    slope_above: float
    gain: float
    n: int

    @property
    def threshold(self) -> float:
        """The bend as a probability: what `forecast(..., threshold=...)` takes."""
        return float(np.exp(self.log_p))


def calibrate(table: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> Knee:
    """Fit two lines that meet, priming_median on log_p_before, and say how well their meeting point is known.

    The published threshold, 1e-3, was read off a scatter without test or interval, on models of billions of parameters; it need not hold
    for yours. A wide interval or a small `gain` says that your facts show no threshold: use `PrimingForecast` instead of a flag.

    Args:
        table: one row a fact with log_p_before and priming_median; at least 24 facts, of all probabilities.
        n_resamples: of the bootstrap over facts, percentile.
        seed: of the bootstrap.

    Raises:
        DataError: a column is absent, fewer than 24 facts remain, or fewer than six different probabilities occur.
        SettingError: `n_resamples` is below 1.

    Source: ours; the threshold is from Sun et al. 2025 (arXiv 2504.09522).
    """
    if n_resamples < 1:
        raise SettingError(f"n_resamples={n_resamples} must be above 0; 2000 give a steady interval.")
    kept = _whole_rows(table, (COVARIATES[0], RESPONSE), MIN_FACTS_KNEE, "a threshold")
    x, y = (kept[name].to_numpy(np.float64) for name in (COVARIATES[0], RESPONSE))
    places = np.unique(x)
    if len(places) < 6:
        raise DataError(f"the {len(kept)} facts have {len(places)} different values of log_p_before; a bend needs six or more.")
    candidates = np.linspace(places[1], places[-2], _N_CANDIDATES)
    whole, weights = _bent(x, y, candidates, np.ones((1, len(x))))
    best = int(whole[0].argmin())
    draws = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=n_resamples).astype(np.float64)
    errors, _ = _bent(x, y, candidates, draws)
    low, high = map(float, np.quantile(candidates[errors.argmin(1)], [0.025, 0.975]))
    straight = float(np.var(y - np.polyval(np.polyfit(x, y, 1), x)) * len(x))
    gain = 1 - float(whole[0, best]) / straight if straight > 0 else 0.0
    return Knee(float(candidates[best]), low, high, float(weights[0, best, 1]), float(weights[0, best, 2]), max(0.0, gain), len(x))


def _bent(x: Array, y: Array, candidates: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted least squares of two lines meeting at each candidate.

    Args:
        weights: (R, N) how often each fact was drawn.

    Returns:
        (R, K) squared errors, and (R, K, 3) height at the bend, slope below, slope above.
    """
    errors, coefficients = [], []
    total = weights @ y**2
    for place in candidates:
        design = np.stack([np.ones_like(x), np.minimum(x - place, 0), np.maximum(x - place, 0)], axis=1)
        square = np.einsum("rn,np,nq->rpq", weights, design, design, optimize=True)
        moment = (weights * y) @ design
        # a resample may leave one side empty; the pseudo-inverse then gives that side slope 0
        fitted = np.einsum("rpq,rq->rp", np.linalg.pinv(square, hermitian=True), moment)
        errors.append(np.maximum(total - (fitted * moment).sum(1), 0.0))
        coefficients.append(fitted)
    return np.stack(errors, axis=1), np.stack(coefficients, axis=1)


def _design(table: pd.DataFrame) -> Array:
    return np.column_stack([np.ones(len(table)), *(table[name].to_numpy(np.float64) for name in COVARIATES)])


def _whole_rows(table: pd.DataFrame, columns: tuple[str, ...], least: int, purpose: str) -> pd.DataFrame:
    _require_columns(table, columns)
    kept: pd.DataFrame = table[np.isfinite(table[list(columns)].to_numpy(np.float64)).all(1)]
    if len(kept) < least:
        raise DataError(f"{purpose} needs {least} facts or more; {len(kept)} of {len(table)} rows have {', '.join(columns)}.")
    return kept


def _require_columns(table: pd.DataFrame, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns)) or 'no columns'}.")
