"""What forget events did, read from the ledger of one cell.

Everything is averaged over the cell's forget events and the subjects that each of them took out. "Before" is the last
measurement before the event, "after" the one at its end.
"""

from collections import defaultdict

import numpy as np
import pandas as pd

from remanence.probes.matrix import event_ends, readers
from remanence.probes.metrics import Result

RELEARNED = 0.9
"""Share of the old accuracy at which a task counts as learned again."""

_NEVER = "nothing was forgotten in this stream"
_PARTS = (
    "forgotten_accuracy_before",
    "forgotten_accuracy_after",
    "rest_change",
    "membership_auc_before",
    "membership_auc_after",
    "relearn_examples",
    "fresh_examples",
    "relearn_ratio",
)


class _Pool:
    """Values and reasons for missing ones, by metric."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.reasons: dict[str, str] = {}

    def add(self, metric: str, value: float, reason: str) -> None:
        if np.isnan(value):
            self.reasons[metric] = reason
        else:
            self.values[metric].append(value)

    def result(self, metric: str) -> Result:
        if self.values[metric]:
            return Result(float(np.mean(self.values[metric])), self.reasons.get(metric, ""))
        return Result(np.nan, self.reasons.get(metric, "not measured"))


def forget_effects(frame: pd.DataFrame, reader: str | None = None) -> dict[str, Result]:
    """The forget verb's metrics of one cell.

    Returns:
        metric -> Result: `forgets` (1 or 0), accuracy on the forgotten before and after, `rest_change` (accuracy on what was
        learned and not forgotten, after minus before), membership AUC before and after, and examples until 90 % of
        the old accuracy is back, for the learner, for a fresh one, and their ratio.
    """
    ends = event_ends(frame)
    events = sorted(set(ends[ends["verb"] == "forget"]["event"]))
    if not events:
        return dict.fromkeys(("forgets", *_PARTS), Result(np.nan, _NEVER))
    pool = _Pool()
    gone: set[str] = set()
    for event in events:
        rows = ends[ends["event"] == event]
        refused = rows[(rows["metric"] == "erasure_supported") & (rows["value"] == 0)]
        pool.add("forgets", float(len(refused) == 0), "")
        if len(refused):
            for metric in _PARTS:
                pool.add(metric, np.nan, str(refused["note"].iloc[0]) or "the learner cannot forget")
            continue
        subjects = forgotten_subjects(rows)
        gone.update(subjects)
        _one_event(pool, ends, event, subjects, gone, readers(frame)[0] if reader is None else reader)
    return {metric: pool.result(metric) for metric in ("forgets", *_PARTS)}


def forgotten_subjects(rows: pd.DataFrame) -> list[str]:
    """The subjects that one forget event took out: its task, or the parts of a composite one.

    Args:
        rows: the rows read after that event.
    """
    measured = set(rows[rows["probe"] == "accuracy"]["subject"])
    task = str(rows["task"].iloc[0])
    if task in measured:
        return [task]
    traced = rows[rows["probe"].isin(["relearning", "membership"]) | (rows["metric"] == "erasure_supported")]
    return [name for name in dict.fromkeys(traced["subject"]) if name]


def _one_event(pool: _Pool, ends: pd.DataFrame, event: int, subjects: list[str], gone: set[str], reader: str) -> None:
    accuracy = ends[(ends["probe"] == "accuracy") & (ends["metric"] == "accuracy") & (ends["reader"] == reader)]
    before = _latest(accuracy[accuracy["event"] < event])
    after = _latest(accuracy[accuracy["event"] == event])
    guessed = ends[(ends["probe"] == "accuracy") & (ends["metric"] == "chance") & (ends["reader"] == reader)]
    chance = _latest(guessed[guessed["event"] < event])
    learned = set(ends[(ends["metric"] == "n_train") & (ends["verb"] == "learn") & (ends["event"] < event)]["subject"])
    missing = "accuracy was not measured"
    for name in subjects:
        pool.add("forgotten_accuracy_before", before.get(name, np.nan), missing)
        pool.add("forgotten_accuracy_after", after.get(name, np.nan), missing)
        is_known = before.get(name, np.nan) > chance.get(name, 0.0)
        _relearning(pool, ends[ends["event"] == event], name, before.get(name, np.nan) if is_known else np.nan)
    rest = [after[name] - before[name] for name in sorted(learned - gone) if name in before and name in after]
    pool.add("rest_change", float(np.mean(rest)) if rest else np.nan, "nothing else was learned, or it was not measured")
    member = ends[ends["metric"] == "membership_auc"]
    for when, rows in (("before", member[member["event"] < event]), ("after", member[member["event"] == event])):
        auc = _latest(rows)
        for name in subjects:
            pool.add(f"membership_auc_{when}", auc.get(name, np.nan), "membership was not measured")


def _relearning(pool: _Pool, rows: pd.DataFrame, subject: str, old: float) -> None:
    """Examples until 90 % of the old accuracy is back; nothing to wait for where the old accuracy (NaN) did not exceed chance."""
    names = {"relearn_examples": "relearn_accuracy", "fresh_examples": "fresh_accuracy"}
    n_examples, why = {}, ""
    for metric, curve in names.items():
        points = rows[(rows["metric"] == curve) & (rows["subject"] == subject) & rows["value"].notna()].sort_values("at")
        n_examples[metric], reason = _examples_until(points, RELEARNED * old)
        pool.add(metric, n_examples[metric], reason)
        why = why or reason
    relearn, fresh = n_examples.values()
    ratio = relearn / fresh if fresh > 0 else np.nan
    pool.add("relearn_ratio", ratio, why or "a fresh learner began at 90 % of the old accuracy")


def _examples_until(points: pd.DataFrame, level: float) -> tuple[float, str]:
    if not len(points):
        return np.nan, "relearning was not measured"
    if np.isnan(level):
        return np.nan, "nothing was left to forget: the old accuracy did not exceed chance"
    reached = points[points["value"] >= level - 1e-12]
    if not len(reached):
        return np.nan, f"90 % of the old accuracy did not come back within {int(points['at'].max())} examples"
    return float(reached["at"].iloc[0]), ""


def _latest(rows: pd.DataFrame) -> dict[str, float]:
    """Subject -> its last measured value."""
    rows = rows[rows["value"].notna()].sort_values("event", kind="stable")
    return {str(name): float(value) for name, value in zip(rows["subject"], rows["value"], strict=True)}
