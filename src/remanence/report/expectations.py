"""What a recipe states about its result, held against what came out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from remanence.errors import RecipeError, nearest


@dataclass(frozen=True)
class Outcome:
    """A statement of a recipe and the mean that was measured; str() is a line for the terminal."""

    learner: str
    stream: str
    metric: str
    low: float
    high: float
    measured: float | None

    @property
    def holds(self) -> bool:
        """Whether the mean lies in the stated range."""
        return self.measured is not None and self.low <= self.measured <= self.high

    def __str__(self) -> str:
        value = "not measured" if self.measured is None else f"{self.measured:.3f}"
        stated = f"stated {self.low:g} to {self.high:g}"
        return f"{'as stated ' if self.holds else 'NOT STATED'}  {self.learner} on '{self.stream}': {self.metric} {value} ({stated})"


def check_expectations(expected: Sequence[dict[str, Any]], verbs: pd.DataFrame) -> list[Outcome]:
    """Compare every entry of a recipe's `expect` with the five-verb frame of its run.

    Args:
        expected: entries {learner, stream, metric, low, high}; the range is for the mean over seeds.
        verbs: what `probes.five_verbs` gives.

    Raises:
        RecipeError: an entry has other keys, or names a metric that is never measured.
    """
    keys = {"learner", "stream", "metric", "low", "high"}
    outcomes = []
    for entry in expected:
        if set(entry) != keys:
            raise RecipeError(f"an entry of `expect` has the keys {sorted(keys)}, got {sorted(entry)}.")
        if entry["metric"] not in set(verbs["metric"]):
            raise RecipeError(
                f"`expect` names the metric '{entry['metric']}', which is not measured.{nearest(entry['metric'], set(verbs['metric']))}"
            )
        rows = verbs[(verbs["learner"] == entry["learner"]) & (verbs["stream"] == entry["stream"]) & (verbs["metric"] == entry["metric"])]
        mean = rows["mean"].dropna()
        outcomes.append(Outcome(**entry, measured=float(mean.iloc[0]) if len(mean) else None))
    return outcomes
