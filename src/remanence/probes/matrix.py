"""From the ledger of one cell to its accuracy matrix.

Axes: T learn events, S subjects.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from remanence.errors import DataError
from remanence.probes.metrics import Mask, Values

_CELL = ["stream", "learner", "seed"]


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """What a cell knew after each learn event, up to the first forget event (afterwards, losing is what was asked).

    Args:
        values: (T, S) accuracy, NaN where it was not measured.
        learned: (T, S) which event taught which subject.
        before: (S,) accuracy before the first event.
        chance: (T, S) share of right answers by guessing.
        seen: (T,) accuracy over all test examples of known classes.
        events: T indices of the learn events in the stream.
        subjects: S names, in the order in which they were taught, untaught ones last.
    """

    values: Values
    learned: Mask
    before: Values
    chance: Values
    seen: Values
    events: tuple[int, ...]
    subjects: tuple[str, ...]


def accuracy_matrix(frame: pd.DataFrame, reader: str | None = None) -> AccuracyMatrix:
    """The accuracy matrix of one cell.

    Args:
        frame: a ledger's rows of one stream, learner and seed.
        reader: the read-out; None for the headline, which is the first that stands in the ledger.

    Raises:
        DataError: the frame holds several cells, or none.
    """
    ends = event_ends(frame)
    accuracy = ends[(ends["probe"] == "accuracy") & (ends["reader"] == (readers(frame)[0] if reader is None else reader))]
    taught = taught_subjects(ends)
    events = list(taught)
    by_subject = accuracy[accuracy["subject"] != ""]
    measured = by_subject[(by_subject["metric"] == "accuracy") & by_subject["value"].notna()]["subject"]
    # a subject with an empty test set is never measured: no column, instead of a column of holes
    order = [name for names in taught.values() for name in names] + sorted(set(measured), key=list(measured).index)
    subjects = [name for name in dict.fromkeys(order) if name in set(measured)]
    values = _table(by_subject, "accuracy", [-1, *events], subjects)
    seen = accuracy[accuracy["metric"] == "accuracy_seen"].set_index("event")["value"].reindex(events)
    return AccuracyMatrix(
        values=values[1:],
        learned=np.array([[name in taught[event] for name in subjects] for event in events], dtype=bool).reshape(len(events), -1),
        before=values[0],
        chance=_table(by_subject, "chance", events, subjects),
        seen=seen.to_numpy(dtype=np.float64),
        events=tuple(events),
        subjects=tuple(subjects),
    )


def cells(frame: pd.DataFrame) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """(stream, learner, seed, its rows) of each cell, in the order of the ledger."""
    for (stream, learner, seed), cell in frame.groupby(_CELL, sort=False):
        yield str(stream), str(learner), int(str(seed)), cell


def event_ends(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that were read before the first event and after each event.

    Raises:
        DataError: the frame holds several cells, or none.
    """
    n_cells = len(frame[_CELL].drop_duplicates())
    if n_cells != 1:
        raise DataError(f"one cell (stream, learner, seed) is needed; the frame holds {n_cells}. Take them one by one with `cells`.")
    return frame[frame["step"].isna()]


def readers(frame: pd.DataFrame) -> list[str]:
    """The read-outs that accuracy was measured for, the headline first; [""] where there is none."""
    return list(dict.fromkeys(frame[frame["probe"] == "accuracy"]["reader"])) or [""]


def taught_subjects(ends: pd.DataFrame) -> dict[int, list[str]]:
    """Learn event -> names of the subjects it taught, up to the first forget event."""
    forgets = ends[ends["verb"] == "forget"]["event"]
    rows = ends[(ends["probe"] == "run") & (ends["metric"] == "n_train") & (ends["verb"] == "learn")]
    if len(forgets):
        rows = rows[rows["event"] < forgets.min()]
    taught: dict[int, list[str]] = {}
    for event, name in sorted(zip(rows["event"], rows["subject"], strict=True), key=lambda pair: int(pair[0])):
        taught.setdefault(int(event), []).append(str(name))
    return taught


def is_independent(frame: pd.DataFrame) -> bool:
    """Whether every task of this cell started from the base state: each event measured what it taught, nothing else."""
    ends = event_ends(frame)
    taught = taught_subjects(ends)
    rows = ends[(ends["probe"] == "accuracy") & (ends["metric"] == "accuracy") & ends["event"].isin(list(taught))]
    measured = {event: frozenset(names) for event, names in rows.groupby("event")["subject"]}
    # an online stream that teaches all subjects in each event measures what it taught as well
    return len(set(measured.values())) > 1 and all(names <= set(taught[int(str(event))]) for event, names in measured.items())


def accuracy_when_learned(frame: pd.DataFrame, reader: str | None = None, metric: str = "accuracy") -> dict[str, float]:
    """Subject -> accuracy (or chance) after the last event that taught it; what there is of it, also for independent tasks."""
    ends = event_ends(frame)
    rows = ends[(ends["probe"] == "accuracy") & (ends["metric"] == metric)]
    rows = rows[rows["reader"] == (readers(frame)[0] if reader is None else reader)]
    values = rows.set_index(["event", "subject"])["value"].to_dict()
    last = {name: event for event, names in taught_subjects(ends).items() for name in names}
    return {name: float(values[event, name]) for name, event in last.items() if not np.isnan(values.get((event, name), np.nan))}


def _table(rows: pd.DataFrame, metric: str, events: list[int], subjects: list[str]) -> Values:
    rows = rows[rows["metric"] == metric]
    table = rows.pivot(index="event", columns="subject", values="value").reindex(index=events, columns=subjects)
    return table.to_numpy(dtype=np.float64)
