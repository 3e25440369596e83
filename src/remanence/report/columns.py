"""The headline columns of the five-verb table, shared by the terminal and the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from remanence.probes import five_verbs
from remanence.probes.verbs import CHANCE, NEVER_LEARNED

MISSING = "–"


@dataclass(frozen=True)
class Value:
    """A metric's mean and 95 % interval over seeds."""

    mean: float
    low: float
    high: float
    n: int = 0
    note: str = ""

    @property
    def half_width(self) -> float:
        """Half the interval's width; NaN for one seed."""
        return (self.high - self.low) / 2


_NOTHING = Value(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Column:
    """One column: which verb it belongs to, what it says, and how its cell is written.

    Args:
        verb: learn, keep, disturb, forget or cost.
        title: short; with its unit.
        metrics: one metric, or two for "before → after".
        write: a value as text; missing values never reach it.
        meaning: one sentence for the reader.
    """

    verb: str
    title: str
    metrics: tuple[str, ...]
    write: Callable[[Value], str]
    meaning: str

    def cell(self, values: Mapping[str, Value]) -> str:
        """The cell's text; a dash where nothing was measured."""
        parts = [values.get(metric, _NOTHING) for metric in self.metrics]
        if all(np.isnan(part.mean) for part in parts):
            is_refused = self.title == "erased %" and values.get("forgets", _NOTHING).mean == 0
            return "cannot" if is_refused else MISSING
        return " → ".join(MISSING if np.isnan(part.mean) else self.write(part) for part in parts)

    def note(self, values: Mapping[str, Value]) -> str:
        """Why values are missing."""
        return "; ".join(dict.fromkeys(values[metric].note for metric in self.metrics if metric in values and values[metric].note))


@dataclass(frozen=True)
class TableRow:
    """One learner (on one stream) of the five-verb table; `is_reference` marks chance and never learned."""

    label: str
    store: str
    stream: str
    learner: str
    reader: str
    values: dict[str, Value] = field(default_factory=dict)
    is_reference: bool = False


def percent(value: Value) -> str:
    """A share as percent, "93.1 ± 2.0".

    Example:
        >>> percent(Value(0.931, 0.911, 0.951)), percent(Value(0.5, float("nan"), float("nan")))
        ('93.1 ± 2.0', '50.0')
    """
    return f"{_plain(100 * value.mean)}{_width(100 * value.half_width)}"


def points(value: Value) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return f"{_plain(100 * value.mean, '+')}{_width(100 * value.half_width)}"


def short_percent(value: Value) -> str:
    """A share as percent without its interval, for narrow cells."""
    return _plain(100 * value.mean)


def decimals(value: Value) -> str:
    """A plain number with two decimals."""
    return f"{value.mean:.2f}"


def times(value: Value) -> str:
    """A ratio, "0.25×"."""
    return f"{value.mean:.2f}×"


def kibibytes(value: Value) -> str:
    """Bytes as KiB with three digits."""
    return _three_digits(value.mean / 1024)


def count(value: Value) -> str:
    """A count with three digits and k, M, G or T.

    Example:
        >>> [count(Value(number, number, number)) for number in (0, 7, 950, 12_345, 2_500_000)]
        ['0', '7', '950', '12.3k', '2.5M']
    """
    number = value.mean
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{_three_digits(number / (size if letter != 'k' else 1e3))}{letter}"
    return f"{number:.0f}"


def seconds(value: Value) -> str:
    """Seconds, finer where there are few."""
    return f"{value.mean:.2f}" if value.mean < 10 else f"{value.mean:.0f}"


COLUMNS: tuple[Column, ...] = (
    Column("learn", "learned %", ("learning_accuracy",), percent, "Accuracy on each task right after it was learned."),
    Column("keep", "average %", ("average_accuracy",), percent, "Accuracy over all learned tasks after the last was learned."),
    Column("keep", "forgetting pt", ("forgetting_first",), points, "Accuracy lost between learning a task and the end."),
    Column("disturb", "others pt", ("interference",), points, "Change on the tasks not being learned, per learn event."),
    Column("disturb", "bystanders pt", ("bystander_change",), points, "Change on what nobody learned here, end against start."),
    Column(
        "forget",
        "erased %",
        ("forgotten_accuracy_before", "forgotten_accuracy_after"),
        short_percent,
        "Accuracy on the task taken out, before and after.",
    ),
    Column("forget", "rest pt", ("rest_change",), points, "Change on the learned tasks that were to stay."),
    Column("forget", "relearn", ("relearn_ratio",), times, "Examples to learn it again, as a share of what a fresh learner needs."),
    Column(
        "forget",
        "member AUC",
        ("membership_auc_before", "membership_auc_after"),
        decimals,
        "How well a loss threshold tells members from strangers, before and after; 0.50 is guessing.",
    ),
    Column("cost", "KiB/task", ("bytes_per_task",), kibibytes, "State held per learned task."),
    Column("cost", "trained", ("trainable_parameters",), count, "Numbers that a step changes."),
    Column("cost", "steps", ("steps",), count, "Training steps of the whole stream."),
    Column("cost", "examples", ("examples",), count, "Examples processed, replayed ones included."),
    Column("cost", "seconds", ("seconds",), seconds, "Time spent learning, measuring left out."),
)


def table_rows(frames: Sequence[pd.DataFrame]) -> list[TableRow]:
    """The rows of the five-verb table of one or several runs, in recipe order, reference rows last.

    Labels tell apart what must be told apart: the reader where a learner has several, the stream where there are several,
    the run where several are compared and the label would stand twice.
    """
    tables = [(str(frame["run"].iloc[0]) if len(frame) else "", five_verbs(frame)) for frame in frames]
    n_streams = len({stream for _, table in tables for stream in table["stream"]})
    rows: list[TableRow] = []
    runs: list[str] = []
    for run, table in tables:
        for (stream, learner, store, reader), group in table.groupby(["stream", "learner", "store", "reader"], sort=False):
            label = str(learner) + (f" · {reader}" if reader else "") + (f" @ {stream}" if n_streams > 1 else "")
            values = {
                str(row.metric): Value(float(row.mean), float(row.low), float(row.high), int(row.n), str(row.note))  # type: ignore[arg-type]
                for row in group.itertuples()
            }
            is_reference = learner in (CHANCE, NEVER_LEARNED)
            rows.append(TableRow(label, str(store), str(stream), str(learner), str(reader), values, is_reference))
            runs.append(run)
    labels = [row.label for row in rows]
    named = [
        TableRow(f"{row.label} [{run[:6]}]", *list(vars(row).values())[1:]) if labels.count(row.label) > 1 else row
        for row, run in zip(rows, runs, strict=True)
    ]
    return sorted(named, key=lambda row: row.is_reference)


def _plain(number: float, sign: str = "-") -> str:
    text = f"{number:{sign}.1f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def _width(half: float) -> str:
    return "" if np.isnan(half) else f" ± {half:.1f}"


def _three_digits(number: float) -> str:
    text = f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
    return text if "e" not in text else f"{number:.2g}"
