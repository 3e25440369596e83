"""The five verbs: one tidy table from any ledger, whatever the mechanism.

frame = Ledger.open(run_folder)
five_verbs(frame)                                                  # mean and 95 % interval over seeds
paired_difference(frame, "average_accuracy", "Replay", "FineTune")
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from remanence.errors import SettingError, nearest
from remanence.probes import metrics
from remanence.probes.forgets import forget_effects
from remanence.probes.matrix import (
    AccuracyMatrix,
    accuracy_matrix,
    accuracy_when_learned,
    cells,
    event_ends,
    is_independent,
    readers,
)
from remanence.probes.metrics import Result
from remanence.probes.spending import cost_of, examples_to_learn
from remanence.probes.statistics import Interval, interval

CHANCE = "chance"
NEVER_LEARNED = "never learned"

VERBS: dict[str, dict[str, str]] = {
    "learn": {"learning_accuracy": "1", "plasticity": "1", "examples_to_learn": "example"},
    "keep": {
        "average_accuracy": "1",
        "average_incremental_accuracy": "1",
        "forgetting_first": "1",
        "forgetting_max": "1",
        "forgetting_step": "1",
        "backward_transfer": "1",
        "forward_transfer": "1",
    },
    "disturb": {"interference": "1", "bystander_change": "1"},
    "forget": {
        "forgets": "1",
        "forgotten_accuracy_before": "1",
        "forgotten_accuracy_after": "1",
        "rest_change": "1",
        "relearn_examples": "example",
        "fresh_examples": "example",
        "relearn_ratio": "1",
        "membership_auc_before": "1",
        "membership_auc_after": "1",
    },
    "cost": {
        "bytes_per_task": "byte",
        "trainable_parameters": "parameter",
        "steps": "step",
        "examples": "example",
        "seconds": "second",
        "flops_learn": "FLOP",
        "flops_predict": "FLOP",
        "peak_memory_bytes": "byte",
    },
}
"""Verb -> metric -> unit."""

_OF_MATRIX = (
    "learning_accuracy",
    "average_accuracy",
    "forgetting_first",
    "forgetting_max",
    "forgetting_step",
    "backward_transfer",
    "interference",
)
_INDEPENDENT = "every task of this stream starts from the base state"
_ROW = ["stream", "learner", "store", "reader"]


def five_verbs(frame: pd.DataFrame) -> pd.DataFrame:
    """Every metric of every learner on every stream, with its 95 % interval over seeds.

    Args:
        frame: the rows of a whole run, as from `Ledger.open`.

    Returns:
        One row per (stream, learner, reader, verb, metric) with `mean`, `low`, `high`, `n` (seeds), `unit` and `note` (why values
        are missing). Learners "chance" and "never learned" are the reference rows: guessing among the classes at
        the end, and the learners' mean accuracy before the first event.
    """
    rows = []
    for key, group in cell_metrics(frame).groupby([*_ROW, "verb", "metric"], sort=False):
        rows.append([*key, *interval(group["value"].to_list()), group["unit"].iloc[0], _note(group)])
    return pd.DataFrame(rows, columns=[*_ROW, "verb", "metric", *Interval._fields, "unit", "note"])


def cell_metrics(frame: pd.DataFrame) -> pd.DataFrame:
    """The same metrics one seed at a time: columns stream, learner, store, reader, seed, verb, metric, value, unit, note."""
    alone = _learned_alone(frame)
    rows: list[list[Any]] = []
    for stream, learner, seed, cell in cells(frame):
        for reader in readers(cell):
            is_headline = reader == readers(cell)[0]
            results = _metrics_of(cell, reader, is_headline, alone.get((learner, seed), {}))
            for verb, units in VERBS.items():
                for metric, unit in units.items():
                    if metric in results:
                        value, note = results[metric]
                        rows.append([stream, learner, cell["store"].iloc[0], reader, seed, verb, metric, value, unit, note])
    table = pd.DataFrame(rows, columns=[*_ROW, "seed", "verb", "metric", "value", "unit", "note"])
    return pd.concat([table, _references(frame, table.columns)], ignore_index=True) if len(table) else table


def paired_difference(frame: pd.DataFrame, metric: str, first: str, second: str) -> Interval:
    """First minus second, seed by seed, with a 95 % interval; the headline reader of each.

    Args:
        frame: the rows of a whole run.
        metric: one of `VERBS`.
        first: a learner's name, or "learner @ stream" where it ran on several.
        second: as `first`.

    Raises:
        SettingError: an unknown metric or learner, or a learner on several streams with none named.
    """
    table = cell_metrics(frame)
    known = sorted({name for metrics_of_verb in VERBS.values() for name in metrics_of_verb})
    if metric not in known:
        raise SettingError(f"metric '{metric}' is unknown.{nearest(metric, known)}")
    both = [_by_seed(table[table["metric"] == metric], name) for name in (first, second)]
    difference = both[0].sub(both[1]).dropna()
    return interval(difference.to_list())


def _by_seed(table: pd.DataFrame, name: str) -> "pd.Series[float]":
    full = table["learner"] + " @ " + table["stream"]
    found = table[(table["learner"] == name) | (full == name)]
    if not len(found):
        raise SettingError(f"learner '{name}' is not in this run.{nearest(name, {*table['learner'], *full})}")
    if found["stream"].nunique() > 1:
        raise SettingError(f"'{name}' ran on several streams; say which: {', '.join(sorted(set(full[found.index])))}.")
    values: pd.Series[float] = found[found["reader"] == found["reader"].iloc[0]].set_index("seed")["value"]
    return values


def _metrics_of(cell: pd.DataFrame, reader: str, is_headline: bool, alone: dict[str, float]) -> dict[str, Result]:
    results = _independent(cell, reader) if is_independent(cell) else _sequential(cell, reader, alone)
    results["examples_to_learn"] = examples_to_learn(cell, reader)
    forgets = forget_effects(cell, reader)
    if not is_headline:
        # relearning, membership and cost are read once, for the headline
        shared = ("forgotten_accuracy_before", "forgotten_accuracy_after", "rest_change")
        return results | {metric: forgets[metric] for metric in shared}
    return results | forgets | cost_of(cell)


def _sequential(cell: pd.DataFrame, reader: str, alone: dict[str, float]) -> dict[str, Result]:
    matrix = accuracy_matrix(cell, reader)
    values, learned = matrix.values, matrix.learned
    seen = metrics.accuracy_on_seen(values, learned) if np.isnan(matrix.seen).any() else matrix.seen
    results = {name: getattr(metrics, name)(values, learned) for name in _OF_MATRIX}
    results["average_incremental_accuracy"] = metrics.average_incremental_accuracy(seen)
    results["forward_transfer"] = metrics.forward_transfer(values, learned, matrix.before)
    results["plasticity"] = metrics.plasticity(values, learned, np.array([alone.get(name, np.nan) for name in matrix.subjects]))
    results["bystander_change"] = _bystander_change(cell, matrix, reader)
    return results


def _independent(cell: pd.DataFrame, reader: str) -> dict[str, Result]:
    values = list(accuracy_when_learned(cell, reader).values())
    names = [*VERBS["learn"], *VERBS["keep"], *VERBS["disturb"]]
    results = dict.fromkeys(names, Result(np.nan, _INDEPENDENT))
    return results | {"learning_accuracy": Result(float(np.mean(values))) if values else Result(np.nan, "not measured")}


def _bystander_change(cell: pd.DataFrame, matrix: AccuracyMatrix, reader: str) -> Result:
    """Accuracy on bystanders after the last learn event, minus before the first event; mean over bystanders."""
    ends = event_ends(cell)
    rows = ends[(ends["probe"] == "bystanders") & (ends["metric"] == "accuracy") & (ends["reader"] == reader)]
    if not len(rows):
        return Result(np.nan, "the stream has no bystanders, or they were not measured")
    if not matrix.events:
        return Result(np.nan, "nothing was learned")
    table = rows.pivot(index="event", columns="subject", values="value").reindex(index=[-1, matrix.events[-1]])
    change = (table.iloc[1] - table.iloc[0]).dropna()
    if len(change):
        return Result(float(change.mean()))
    notes = [note for note in rows["note"] if note]
    return Result(np.nan, str(notes[0]) if notes else "bystanders were not measured before and after")


def _learned_alone(frame: pd.DataFrame) -> dict[tuple[str, int], dict[str, float]]:
    """(learner, seed) -> subject -> accuracy where the same learner learned it from the base state."""
    alone: dict[tuple[str, int], dict[str, float]] = {}
    for _, learner, seed, cell in cells(frame):
        if is_independent(cell):
            alone.setdefault((learner, seed), {}).update(accuracy_when_learned(cell))
    return alone


def _references(frame: pd.DataFrame, columns: "pd.Index[str]") -> pd.DataFrame:
    """Rows "chance" and "never learned": one value per stream and seed, the mean over the learners."""
    found: dict[tuple[str, str, int, str], list[float]] = {}
    for stream, _, seed, cell in cells(frame):
        for name, metric, value in _reference_values(cell):
            found.setdefault((stream, name, seed, metric), []).append(value)
    rows = [
        [stream, name, "", "", seed, "learn" if metric in VERBS["learn"] else "keep", metric, float(np.mean(values)), "1", ""]
        for (stream, name, seed, metric), values in found.items()
    ]
    return pd.DataFrame(rows, columns=columns)


def _reference_values(cell: pd.DataFrame) -> Iterator[tuple[str, str, float]]:
    """(reference, metric, value): guessing, and the learner before the first event."""
    when_learned = accuracy_when_learned(cell, metric="chance")
    before = _before(cell)
    if when_learned:
        yield CHANCE, "learning_accuracy", float(np.mean(list(when_learned.values())))
    if before:
        yield NEVER_LEARNED, "learning_accuracy", float(np.mean(list(before.values())))
    if is_independent(cell):
        return
    matrix = accuracy_matrix(cell)
    values, learned = metrics.complete_prefix(matrix.values, matrix.learned)
    known = learned.any(axis=0)
    if not known.any():
        return
    yield CHANCE, "average_accuracy", float(matrix.chance[len(values) - 1][known].mean())
    if not np.isnan(matrix.before[known]).any():
        yield NEVER_LEARNED, "average_accuracy", float(matrix.before[known].mean())


def _before(cell: pd.DataFrame) -> dict[str, float]:
    """Subject -> accuracy before the first event."""
    ends = event_ends(cell)
    rows = ends[(ends["probe"] == "accuracy") & (ends["metric"] == "accuracy") & (ends["event"] == -1)]
    rows = rows[rows["reader"] == readers(cell)[0]].dropna(subset=["value"])
    return dict(zip(rows["subject"].astype(str), rows["value"].astype(float), strict=True))


def _note(group: pd.DataFrame) -> str:
    notes = list(dict.fromkeys(note for note in group["note"] if note))
    n_missing = int(group["value"].isna().sum())
    if not notes or n_missing == len(group):
        return "; ".join(notes)
    where = f"{n_missing} of {len(group)} seeds without a value" if n_missing else "in part"
    return f"{where}: {'; '.join(notes)}"
