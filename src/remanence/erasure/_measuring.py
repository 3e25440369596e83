"""What a certificate measures: keywords, priming, held-out loss, relearning; `remanence.erasure.certifying` puts it together.

Axes: N facts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from remanence.erasure.certificate import Measure, Value
from remanence.erasure.erasing import uniform_log_p
from remanence.erasure.relearning import relearning_steps
from remanence.errors import NonFiniteLoss
from remanence.facts.records import FactSet
from remanence.facts.scoring import KeywordScorer
from remanence.parts.language_model import held_out_loss, is_quantised
from remanence.probes.priming import PrimingProbe
from remanence.probes.statistics import cluster_bootstrap
from remanence.task import Data

AS_NEW = 0.8
"""Share of a newcomer's steps from which on relearning counts as learning anew."""
_CONTROLS = 4
_PRIMING = {
    "priming_median": "nat",
    "log_s_prime": "nat",
    "priming_dp": "probability",
    "priming_flip": "share",
    "cross_priming": "nat",
    "drift": "nat",
    "paraphrase_median": "nat",
}


# --- keywords ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keywords:
    """(N,) float64 log-probabilities in nats, and where they should be."""

    before: np.ndarray[Any, Any]
    after: np.ndarray[Any, Any]
    never: np.ndarray[Any, Any] | None
    target: float
    origin: str
    scorer_warnings: tuple[str, ...]

    def measures(self) -> tuple[Measure, Measure]:
        log_p = [_over_facts(values, np.median) for values in (self.before, self.after)]
        p = [_over_facts(np.exp(values)) for values in (self.before, self.after)]
        return (
            Measure("keyword_log_p", "nat", log_p[0], log_p[1], self.target, "median over facts"),
            Measure("keyword_p", "probability", p[0], p[1], float(np.exp(self.aims()).mean()), "mean over facts"),
        )

    def aims(self) -> np.ndarray[Any, Any]:
        """(N,) where each fact should stand: at its own value in the model that never saw it, else at the common target."""
        return self.never if self.never is not None and self.origin == "never_learned" else np.full(len(self.after), self.target)

    def records(self, facts: FactSet) -> tuple[dict[str, Any], ...]:
        never = [None] * len(facts) if self.never is None else self.never.tolist()
        rows = zip(facts, self.before.tolist(), self.after.tolist(), never, strict=True)
        return tuple({"id": fact.id, "log_p_before": old, "log_p_after": new, "log_p_never_learned": base} for fact, old, new, base in rows)


def score_keywords(
    before: nn.Module, after: nn.Module, facts: FactSet, tokenizer: Any, never_learned: nn.Module | None, target_log_p: float | None
) -> Keywords:
    scorer = KeywordScorer(tokenizer, [(fact.prompt, fact.keyword) for fact in facts])
    old, new = _scored(scorer, before), _scored(scorer, after)
    never = None if never_learned is None else _scored(scorer, never_learned)
    if target_log_p is not None:
        target, origin = target_log_p, "given"
    elif never is not None:
        target, origin = float(np.median(never)), "never_learned"
    else:
        target, origin = uniform_log_p(after), "uniform"
    return Keywords(old, new, never, target, origin, tuple(scorer.warnings))


def _scored(scorer: KeywordScorer, model: nn.Module) -> np.ndarray[Any, Any]:
    log_p: np.ndarray[Any, Any] = scorer(model).log_p.double().numpy()
    return log_p


def _over_facts(values: Any, statistic: Callable[..., Any] = np.mean) -> Value:
    """A statistic over facts; prefixes of a fact were united before, since they do not stand for themselves."""
    found = cluster_bootstrap(np.asarray(values, np.float64), np.zeros(len(values)), statistic)
    return Value(found.mean, found.low, found.high, found.n)


# --- what else moved -----------------------------------------------------------------------------------------------


def measure_priming(pair: tuple[nn.Module, nn.Module], facts: FactSet, tokenizer: Any, never_learned: nn.Module | None) -> list[Measure]:
    if not facts.prefixes:
        return [Measure(name, unit, note="not run: the facts come without prefixes") for name, unit in _PRIMING.items()]
    probe = PrimingProbe(facts, tokenizer, n_controls=_CONTROLS)
    start = probe(pair[0] if never_learned is None else never_learned)
    old, new = (probe(model, start).since(start) for model in pair)
    since = "since before the erasure" if never_learned is None else "since before learning"
    found = []
    for name, unit in _PRIMING.items():
        if old[name].isna().all():
            found.append(Measure(name, unit, note="not run: no fact has a prefix of this kind"))
            continue
        target = None if never_learned is None else 0.0
        # medians of what is in nats, where a single fact may lie far out
        statistic = np.median if unit == "nat" else np.mean
        first, second = (_over_facts(table[name], statistic) for table in (old, new))
        found.append(Measure(name, unit, first, second, target, f"{statistic.__name__} over facts, {since}"))
    return found


def measure_held_out(pair: tuple[nn.Module, nn.Module], held_out: Data | None, never_learned: nn.Module | None) -> Measure:
    if held_out is None or len(held_out) == 0:
        return Measure("held_out_loss", "nat/token", note="not run: no held-out text was given")
    old, new = (Value(held_out_loss(model, held_out)) for model in pair)
    base = old.value if never_learned is None else held_out_loss(never_learned, held_out)
    note = "target: no change" if never_learned is None else "target: before learning"
    return Measure("held_out_loss", "nat/token", old, new, base, note)


# --- relearning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relearning:
    """Steps to learn the facts again, and beside those of a newcomer; `ratio` is None where it is unknown."""

    measures: tuple[Measure, ...] = (
        Measure("relearning_steps", "step", note="not run: not asked for"),
        Measure("relearning_ratio", "1", note="not run: not asked for"),
    )
    ratio: float | None = None
    warnings: tuple[str, ...] = ()


def measure_relearning(
    pair: tuple[nn.Module, nn.Module], facts: FactSet, tokenizer: Any, never_learned: nn.Module | None, lr: float, cap: int
) -> Relearning:
    if any(map(is_quantised, pair)):
        note = "not run: a quantised model cannot be trained"
        return Relearning((Measure("relearning_steps", "step", note=note), Measure("relearning_ratio", "1", note=note)))
    models = [*pair, *([] if never_learned is None else [never_learned])]
    try:
        counts = [relearning_steps(model, facts, tokenizer, lr=lr, cap=cap) for model in models]
    except NonFiniteLoss as error:
        note = f"not run: the attack broke off at lr={lr} ({error})"
        return Relearning((Measure("relearning_steps", "step", note=note), Measure("relearning_ratio", "1", note=note)))
    old, new = counts[:2]
    beyond = [name for name, count in zip(("before", "after", "target"), counts, strict=False) if count is None]
    note = f"until the mean keyword probability exceeds 0.5; AdamW, lr {lr:g}" + (f"; beyond {cap}: {', '.join(beyond)}" if beyond else "")
    # a count beyond the cap is entered as the cap, and said to lie beyond
    first, second = (Value(float(cap if count is None else count)) for count in (old, new))
    if never_learned is None:
        measure = Measure("relearning_steps", "step", first, second, None, note)
        return Relearning((measure, Measure("relearning_ratio", "1", note="not run: no model that never saw the facts was given")))
    base = counts[2]
    measure = Measure("relearning_steps", "step", first, second, float(cap if base is None else base), note)
    ratio, words, warnings = _ratio(new, base, cap)
    shown = None if ratio is None else Value(ratio)
    return Relearning((measure, Measure("relearning_ratio", "1", None, shown, 1.0, words)), ratio, warnings)


def _ratio(new: int | None, base: int | None, cap: int) -> tuple[float | None, str, tuple[str, ...]]:
    """Steps after the erasure over a newcomer's; a lower bound where only the former lie beyond the cap, else unknown."""
    if base == 0:
        return None, "unknown: the model that should never have seen the facts knows them", ()
    if base is None and new is not None and new < AS_NEW * cap:
        return new / cap, "at most: the newcomer needs more steps than the cap", (_returns(new, cap, "more than "),)
    if base is None:
        advice = f"the level 'relearning' cannot be told: a newcomer does not learn the facts within {cap} steps either; raise the cap"
        return None, f"unknown: the newcomer needs more than {cap} steps", (advice,)
    if new is None:
        return cap / base, "at least: the erased model needs more steps than the cap", ()
    ratio = new / base
    return ratio, "of a newcomer's steps", (_returns(new, base),) if ratio < AS_NEW else ()


def _returns(new: int, base: int, more: str = "") -> str:
    return f"the facts come back in {new} steps, a model that never saw them takes {more}{base}: traces are left in the weights"
