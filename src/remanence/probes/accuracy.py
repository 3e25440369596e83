"""How many test examples a learner answers rightly, and how many it would by guessing.

    probes:
      - {call: remanence.probes.Accuracy, at: log}

Axes: N examples, C classes, T tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from remanence.learner import Learner, Prediction
from remanence.probe import Probe, Reading, View, check_grid
from remanence.task import Task

NO_CLASSES = "the learner knows no classes yet"
TOKEN_ROWS = 16
"""Rows of text that are asked at once."""


class Accuracy(Probe):
    """Accuracy, chance and, over everything the learner knows, `accuracy_seen`.

    Readings, for every reader of the learner:

    - `accuracy` and `chance` of every subject. Chance is what a uniform choice among the classes that the learner chose
      from would get: the mean over examples of [target among them] / C; 0 while there are no classes.
    - `accuracy_seen`, subject "": over all test examples whose class the learner knows, every example counting once.
    - `loss` of every subject whose answer is tokens: nats per token.

    Of text, targets below 0 (padding) are not counted, and few rows are asked at a time, so that no answer to a whole test set
    ever stands in memory.

    Args:
        at: "event": after each event; k: every k steps as well; "log": at steps 1, 2, 4, ... as well.
        verbs: events to follow; always also before the first one.

    Raises:
        SettingError: `at` is no grid.

    Source: a_t as in Rebuffi et al. 2017 (iCaRL).
    """

    name = "accuracy"

    def __init__(self, at: int | Literal["event", "log"] = "event", verbs: tuple[str, ...] = ("learn", "forget")) -> None:
        check_grid(at)
        self.at = at
        self.verbs = ("", *(verb for verb in verbs if verb))

    def __call__(self, view: View) -> Iterator[Reading]:
        for reader in view.learner.readers:
            counts = _counts(view, reader)
            for task, count in zip(view.subjects, counts, strict=True):
                yield from count_readings(task, count, reader)
                if task.answer == "tokens":
                    yield _loss(view, task, reader)
            n_known = sum(count.n_known for count in counts)
            if n_known:
                n_right = sum(count.n_right_known for count in counts)
                yield Reading("", "accuracy_seen", n_right / n_known, "1", reader)
            else:
                yield Reading("", "accuracy_seen", None, "1", reader, note="no test example is of a class that the learner knows")


@dataclass(frozen=True)
class Count:
    """Counts over a test set: targets, right answers, targets among the learner's classes, both, and how many classes those are."""

    n: int = 0
    n_right: int = 0
    n_known: int = 0
    n_right_known: int = 0
    n_classes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.n + other.n, self.n_right + other.n_right, self.n_known + other.n_known, self.n_right_known + other.n_right_known,
            max(self.n_classes, other.n_classes),
        )  # fmt: skip


def count(prediction: Prediction, targets: Tensor) -> Count:
    """Count answers; negative targets of sequences (padding) are none."""
    counted = is_counted(targets)
    is_right, is_known = right(prediction, targets)[counted], torch.isin(targets, prediction.classes.to(targets.device))[counted]
    n_right_known = int((is_right & is_known).sum())
    return Count(int(counted.sum()), int(is_right.sum()), int(is_known.sum()), n_right_known, len(prediction.classes))


def count_answers(view: View, task: Task, reader: str, learner: Learner | None = None) -> Count:
    """Count the answers to a task's test set, a chunk at a time; `learner` stands in for the viewed one."""
    asked, name = learner or view.learner, view.name_for(task)
    return sum((count(asked.predict(inputs, name, reader), targets) for inputs, targets in chunks(task)), Count())


def chunks(task: Task, n_chunks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of a test set in parts, at least `n_chunks`; an answer to text is as large as its vocabulary."""
    size = TOKEN_ROWS if task.answer == "tokens" else max(1, len(task.test))
    starts = range(0, max(len(task.test), size * n_chunks, 1), size)
    return [(task.test.inputs[start : start + size], task.test.targets[start : start + size]) for start in starts]


def _counts(view: View, reader: str) -> list[Count]:
    """Counts of every subject, in order."""
    subjects = view.subjects
    if view.stream.mode != "independent" or len(view.current) == 1:
        return [count_answers(view, task, reader) for task in subjects]
    names = [view.name_for(task) for task in subjects]
    n_chunks = max((len(chunks(task)) for task in subjects), default=0)
    totals = [Count()] * len(subjects)
    for parts in zip(*(chunks(task, n_chunks) for task in subjects), strict=True):
        predictions = view.learner.predict_many([inputs for inputs, _ in parts], names, reader)
        totals = [
            total + count(prediction, targets) for total, prediction, (_, targets) in zip(totals, predictions, parts, strict=True)
        ]
    return totals


def count_readings(task: Task, total: Count, reader: str) -> Iterator[Reading]:
    """`accuracy` and `chance` of one subject."""
    if total.n == 0:
        note = "the test set is empty" if len(task.test) == 0 else "no target of the test set is counted"
        for metric in ("accuracy", "chance"):
            yield Reading(task.name, metric, None, "1", reader, note=note)
        return
    note = "" if total.n_classes else NO_CLASSES
    chance = total.n_known / total.n / total.n_classes if total.n_classes else 0.0
    yield Reading(task.name, "accuracy", total.n_right / total.n, "1", reader, note=note)
    yield Reading(task.name, "chance", chance, "1", reader, note=note)


def right(prediction: Prediction, targets: Tensor) -> Tensor:
    """Which answers are right: (N,) for classes, (N, T) for tokens; bool, on the targets' device."""
    if len(prediction.classes) == 0:
        return torch.zeros_like(targets, dtype=torch.bool)
    return prediction.labels().to(targets.device) == targets


def is_counted(targets: Tensor) -> Tensor:
    """Which targets count: all labels of examples (N,); of sequences (N, T) those that are 0 or above."""
    return targets >= 0 if targets.dim() > 1 else torch.ones_like(targets, dtype=torch.bool)


def _loss(view: View, task: Task, reader: str) -> Reading:
    n_tokens = int(is_counted(task.test.targets).sum())
    if n_tokens == 0:
        note = "the test set is empty" if len(task.test) == 0 else "no target of the test set is counted"
        return Reading(task.name, "loss", None, "nat/token", reader, note=note)
    name = view.name_for(task)
    scores = [view.learner.score(inputs, targets, name, reader).double().sum() for inputs, targets in chunks(task)]
    loss = -float(torch.stack(scores).sum()) / n_tokens
    if not math.isfinite(loss):
        return Reading(task.name, "loss", None, "nat/token", reader, note=f"the loss is {loss}: a target has no probability")
    return Reading(task.name, "loss", loss, "nat/token", reader)
