"""What the figures show, read from the ledger: means over seeds of matrices and curves.

Seeds may draw other class orders, so that the first task of one seed is not the first of another. Seeds are therefore
averaged by position in the stream, and a position carries a name only where all seeds agree on it.

Axes: T learn events, S subjects.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from remanence.probes.matrix import AccuracyMatrix, accuracy_matrix, cells, event_ends, is_independent, readers
from remanence.probes.metrics import Values, first_event


@dataclass(frozen=True, eq=False)
class Panel:
    """One learner on one stream, over its seeds.

    Args:
        matrix: (T, S) mean accuracy; NaN where a seed lacks it.
        names: S names of the positions.
        event_names: T names of the learn events.
        curves: position -> (cumulative step, mean accuracy), ascending.
        forgets: cumulative steps at which forget events began.
        relearn: examples -> mean accuracy when the forgotten was taught again; empty without forget events.
        fresh: the same for a fresh learner.
    """

    label: str
    store: str
    stream: str
    learner: str
    matrix: Values
    names: tuple[str, ...]
    event_names: tuple[str, ...]
    curves: dict[int, list[tuple[float, float]]]
    forgets: tuple[float, ...]
    relearn: list[tuple[float, float]]
    fresh: list[tuple[float, float]]


def panels(frame: pd.DataFrame) -> list[Panel]:
    """One panel per learner and stream, in the order of the ledger; independent streams have none."""
    several = frame["stream"].nunique() > 1
    grouped: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for stream, learner, _, cell in cells(frame):
        if not is_independent(cell):
            grouped.setdefault((stream, learner), []).append(cell)
    found = []
    for (stream, learner), seeds in grouped.items():
        matrices = _of_one_shape([(cell, accuracy_matrix(cell)) for cell in seeds])
        if matrices:
            label = f"{learner} @ {stream}" if several else learner
            found.append(_panel(label, stream, learner, matrices))
    return found


def _of_one_shape(found: list[tuple[pd.DataFrame, AccuracyMatrix]]) -> list[tuple[pd.DataFrame, AccuracyMatrix]]:
    """The seeds that got furthest with the commonest shape: a mean over other shapes says nothing."""
    found = [(cell, matrix) for cell, matrix in found if matrix.values.size]
    if not found:
        return []
    shapes = Counter(matrix.values.shape for _, matrix in found)
    common = shapes.most_common(1)[0][0]
    return [(cell, matrix) for cell, matrix in found if matrix.values.shape == common]


def _panel(label: str, stream: str, learner: str, found: list[tuple[pd.DataFrame, AccuracyMatrix]]) -> Panel:
    matrices = [matrix for _, matrix in found]
    n_events = len(matrices[0].events)
    names = _agreed([matrix.subjects for matrix in matrices], "task")
    taught = [[_event_name(row, names) for row in matrix.learned] for matrix in matrices]
    points: dict[tuple[int, int, float], list[tuple[float, float]]] = {}
    forgets: list[list[float]] = []
    for cell, matrix in found:
        starts = _starts(cell)
        forgets.append([start for (_, verb), start in starts.items() if verb == "forget"])
        for key, point in _points(cell, matrix, {event: start for (event, _), start in starts.items()}):
            points.setdefault(key, []).append(point)
    curves: dict[int, list[tuple[float, float]]] = {}
    for (position, _, _), values in sorted(points.items()):
        curves.setdefault(position, []).append(_mean_point(values))
    n_forgets = min((len(starts) for starts in forgets), default=0)
    return Panel(
        label,
        str(found[0][0]["store"].iloc[0]),
        stream,
        learner,
        np.mean([matrix.values for matrix in matrices], axis=0),
        names,
        tuple(_agreed([tuple(row) for row in taught], "event")) if n_events else (),
        curves,
        tuple(float(np.mean([starts[index] for starts in forgets])) for index in range(n_forgets)),
        _examples_curve(found, "relearn_accuracy"),
        _examples_curve(found, "fresh_accuracy"),
    )


def _agreed(per_seed: list[tuple[str, ...]], noun: str) -> tuple[str, ...]:
    return tuple(
        names[0] if len(set(names)) == 1 else f"{noun} {position}" for position, names in enumerate(zip(*per_seed, strict=True), 1)
    )


def _event_name(row: "np.ndarray[tuple[int], np.dtype[np.bool_]]", names: tuple[str, ...]) -> str:
    taught = [name for name, is_taught in zip(names, row, strict=True) if is_taught]
    return taught[0] if len(taught) == 1 else f"{len(taught)} tasks at once" if taught else "nothing measured"


def _starts(cell: pd.DataFrame) -> dict[tuple[int, str], float]:
    """(event, verb) -> cumulative steps at its beginning; events without a row of steps count 0."""
    ends = event_ends(cell)
    steps = ends[(ends["probe"] == "run") & (ends["metric"] == "steps")].set_index("event")["value"].to_dict()
    starts, total = {(-1, ""): 0.0}, 0.0
    for event, verb in sorted({(int(event), str(verb)) for event, verb in zip(ends["event"], ends["verb"], strict=True) if event >= 0}):
        starts[event, verb] = total
        total += float(steps.get(event, 0.0))
    starts[max(event for event, _ in starts) + 1, "end"] = total
    return starts


def _points(
    cell: pd.DataFrame, matrix: AccuracyMatrix, starts: dict[int, float]
) -> Iterator[tuple[tuple[int, int, float], tuple[float, float]]]:
    """((position, event, step), (cumulative step, accuracy)); an event's end stands at step infinity."""
    rows = cell[(cell["probe"] == "accuracy") & (cell["metric"] == "accuracy") & (cell["reader"] == readers(cell)[0])]
    rows = rows[rows["value"].notna() & rows["subject"].isin(matrix.subjects)]
    positions = {name: index for index, name in enumerate(matrix.subjects)}
    # a curve begins one event before its task is first taught: what lies earlier is the untaught level
    begins = [matrix.events[max(0, first)] - 1 for first in first_event(matrix.learned)]
    for event, step, subject, value in zip(rows["event"], rows["step"], rows["subject"], rows["value"], strict=True):
        if int(event) < begins[positions[subject]] or (int(event) == begins[positions[subject]] and not pd.isna(step)):
            continue
        if pd.isna(step):
            yield (positions[subject], int(event), np.inf), (starts.get(int(event) + 1, 0.0), float(value))
        elif int(event) in starts:
            yield (positions[subject], int(event), float(step)), (starts[int(event)] + float(step), float(value))


def _examples_curve(found: list[tuple[pd.DataFrame, AccuracyMatrix]], metric: str) -> list[tuple[float, float]]:
    """(examples, accuracy) averaged over seeds and forgotten subjects, at positions that most of them share."""
    rows = pd.concat([cell[(cell["metric"] == metric) & cell["value"].notna()] for cell, _ in found])
    if not len(rows):
        return []
    groups = {int(str(at)): group["value"] for at, group in rows.groupby("at")}
    n_curves = max(len(values) for values in groups.values())
    return [(float(at), float(values.mean())) for at, values in sorted(groups.items()) if 2 * len(values) > n_curves]


def _mean_point(values: list[tuple[float, float]]) -> tuple[float, float]:
    return float(np.mean([x for x, _ in values])), float(np.mean([y for _, y in values]))
