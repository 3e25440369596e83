"""How cleanly something came out again: does it come back faster than it first went in, and can membership be told?

    probes:
      - {call: remanence.probes.Relearning}
      - {call: remanence.probes.Membership}

Axes: N examples.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor

from remanence.learner import Learner
from remanence.probe import Probe, Reading, View
from remanence.probes.accuracy import count_answers
from remanence.task import Data, Task

_UNNAMED = "the learner does not name these classes: all scores are -inf and tell nothing apart"


class Relearning(Probe):
    """Teach the forgotten task again, to a copy and to a learner that never learned anything, and watch both.

    Readings for each forgotten task, at 0 examples, after steps 1, 2, 4, ... and at the end: `relearn_accuracy` (the
    copy) and `fresh_accuracy`, both on the task's test set under the stream's rules; `at` counts the examples processed.
    A copy that is much faster still holds what it was asked to forget.

    Caution: a fresh learner of a class-incremental stream chooses among the forgotten task's classes only, the copy
    among all it knows; the fresh curve is therefore a strict yardstick.

    Source: relearning time after Golatkar et al. 2020 (arXiv 1911.04933). ours: against a fresh learner of equal budget.
    """

    name = "relearning"
    verbs = ("forget",)

    def __call__(self, view: View) -> Iterator[Reading]:
        reader = view.learner.readers[0]
        for task in _leaves(view.current):
            if task.train is None or not len(task.train) or not len(task.test):
                for metric in ("relearn_accuracy", "fresh_accuracy"):
                    yield Reading(task.name, metric, None, "1", reader, note="the train or the test set is empty")
                continue
            for metric, learner in (("relearn_accuracy", view.fork()), ("fresh_accuracy", view.fresh())):
                for n_examples, accuracy in _curve(view, learner, task):
                    yield Reading(task.name, metric, accuracy, "1", reader, at=n_examples)


def _curve(view: View, learner: Learner, task: Task) -> Iterator[tuple[int, float]]:
    """(examples processed, test accuracy) on a log grid of steps and at the end, each position once."""
    n_examples, read = 0, 0
    yield 0, _accuracy(view, learner, task)
    for progress in learner.learn(task):
        n_examples += progress.n_examples
        if progress.step & (progress.step - 1) == 0 and progress.step != progress.steps and n_examples > read:
            read = n_examples
            yield read, _accuracy(view, learner, task)
    if n_examples > read:
        yield n_examples, _accuracy(view, learner, task)


def _accuracy(view: View, learner: Learner, task: Task) -> float:
    total = count_answers(view, task, learner.readers[0], learner)
    return total.n_right / total.n if total.n else float("nan")


class Membership(Probe):
    """How well a loss threshold tells trained-on examples from held-out ones: `membership_auc`.

    Members are a task's train examples, non-members its test examples, the score is the learner's log-probability of
    the target. 0.5: nothing can be told (equal scores count half); 1: every member is known. Read for the tasks of the
    event, and for those that the next event will forget, so that every forgetting has a value just before it.

    Source: Yeom et al. 2018 (arXiv 1709.01604), the loss-threshold adversary; AUC over all thresholds.
    """

    name = "membership"
    verbs = ("learn", "forget")

    def __call__(self, view: View) -> Iterator[Reading]:
        reader = view.learner.readers[0]
        for task in _leaves(view.current + _next_forgotten(view)):
            if task.train is None or not len(task.train) or not len(task.test):
                yield Reading(task.name, "membership_auc", None, "1", reader, note="the train or the test set is empty")
                continue
            members, others = (_scores(view, task, data) for data in (task.train, task.test))
            if bool(torch.isnan(members).any() or torch.isnan(others).any()):
                yield Reading(task.name, "membership_auc", None, "1", reader, note="a score is NaN")
                continue
            note = "" if torch.isfinite(torch.cat([members, others])).any() else _UNNAMED
            yield Reading(task.name, "membership_auc", separability(members, others), "1", reader, note=note)


def separability(members: Tensor, others: Tensor) -> float:
    """Area under the ROC curve of "a higher score means member"; equal scores count half, -inf is the lowest score.

    Args:
        members: (N,) scores of members, N > 0.
        others: (M,) scores of non-members, M > 0.

    Example:
        >>> separability(torch.tensor([3.0, 1.0]), torch.tensor([2.0, -torch.inf]))
        0.75
    """
    labels = np.r_[np.ones(len(members)), np.zeros(len(others))]
    # ranks keep the order and are finite where a score is -inf, which scikit-learn refuses
    ranks = rankdata(torch.cat([members, others]).double().cpu().numpy())
    return float(roc_auc_score(labels, ranks))


def _scores(view: View, task: Task, data: Data) -> Tensor:
    scores = view.learner.score(data.inputs, data.targets, view.name_for(task), view.learner.readers[0])
    return scores.detach().cpu().reshape(len(data), -1).sum(-1)


def _leaves(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """The leaves of all tasks, each name once."""
    return tuple({leaf.name: leaf for task in tasks for leaf in task.leaves}.values())


def _next_forgotten(view: View) -> tuple[Task, ...]:
    following = view.event + 1
    if view.stream.mode == "independent" or following >= len(view.stream):
        return ()
    event = view.stream[following]
    return (event.task,) if event.verb == "forget" else ()
