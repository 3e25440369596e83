"""How many test examples a learner answers rightly, and how many it would by guessing.

    probes:
      - {call: remanence.probes.Accuracy, at: log}

Axes: N examples, C classes, T tokens.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from remanence.learner import Prediction
from remanence.probe import Probe, Reading, View, check_grid
from remanence.task import Task

NO_CLASSES = "the learner knows no classes yet"


class Accuracy(Probe):
    """Accuracy, chance and, over everything the learner knows, `accuracy_seen`.

    Readings, for every reader of the learner:

    - `accuracy` and `chance` of every subject. Chance is what a uniform choice among the classes that the learner chose
      from would get: the mean over examples of [target among them] / C; 0 while there are no classes.
    - `accuracy_seen`, subject "": over all test examples whose class the learner knows, every example counting once.
    - `loss` of every subject whose answer is tokens: nats per token.

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
            n_right = n_known = 0
            for task, prediction in _predictions(view, reader):
                yield from subject_readings(task, prediction, reader)
                if task.answer == "tokens":
                    yield _loss(view, task, reader)
                known = _known(prediction, task.test.targets)
                n_known += int(known.sum())
                n_right += int((right(prediction, task.test.targets) & known).sum())
            if n_known:
                yield Reading("", "accuracy_seen", n_right / n_known, "1", reader)
            else:
                yield Reading("", "accuracy_seen", None, "1", reader, note="no test example is of a class that the learner knows")


def _predictions(view: View, reader: str) -> Iterator[tuple[Task, Prediction]]:
    subjects = view.subjects
    if view.stream.mode == "independent" and len(view.current) > 1:
        names = [view.name_for(task) for task in subjects]
        yield from zip(subjects, view.learner.predict_many([task.test.inputs for task in subjects], names, reader), strict=True)
        return
    for task in subjects:
        yield task, view.predict(task, reader)


def subject_readings(task: Task, prediction: Prediction, reader: str) -> Iterator[Reading]:
    """`accuracy` and `chance` of one subject."""
    targets = task.test.targets
    if len(targets) == 0:
        for metric in ("accuracy", "chance"):
            yield Reading(task.name, metric, None, "1", reader, note="the test set is empty")
        return
    n_classes = len(prediction.classes)
    note = "" if n_classes else NO_CLASSES
    chance = float(_known(prediction, targets).double().mean()) / n_classes if n_classes else 0.0
    yield Reading(task.name, "accuracy", float(right(prediction, targets).double().mean()), "1", reader, note=note)
    yield Reading(task.name, "chance", chance, "1", reader, note=note)


def right(prediction: Prediction, targets: Tensor) -> Tensor:
    """Which answers are right: (N,) for classes, (N, T) for tokens; bool, on the targets' device."""
    if len(prediction.classes) == 0:
        return torch.zeros_like(targets, dtype=torch.bool)
    return prediction.labels().to(targets.device) == targets


def _known(prediction: Prediction, targets: Tensor) -> Tensor:
    return torch.isin(targets, prediction.classes.to(targets.device))


def _loss(view: View, task: Task, reader: str) -> Reading:
    n_tokens = task.test.targets.numel()
    if n_tokens == 0:
        return Reading(task.name, "loss", None, "nat/token", reader, note="the test set is empty")
    score = view.learner.score(task.test.inputs, task.test.targets, view.name_for(task), reader)
    loss = -float(score.double().sum()) / n_tokens
    if not torch.isfinite(torch.tensor(loss)):
        return Reading(task.name, "loss", None, "nat/token", reader, note=f"the loss is {loss}: a target has no probability")
    return Reading(task.name, "loss", loss, "nat/token", reader)
