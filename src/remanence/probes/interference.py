"""What learning moves beyond the stream: accuracy on test-only tasks that nobody learns here.

probes:
  - {call: remanence.probes.Bystanders, at: event}
"""

from collections.abc import Iterator
from typing import Literal

from remanence.probe import Probe, Reading, View, check_grid
from remanence.probes.accuracy import count_answers, count_readings


class Bystanders(Probe):
    """`accuracy` and `chance` on each of `stream.bystanders`, for every reader.

    A learner that has no answer for a bystander (none of its classes is among those the learner can name) is not wrong
    about it: the value is None with a note. Interference among the stream's own tasks needs no probe of its own: it is
    a function of the accuracy matrix, see `remanence.probes.metrics.interference`.

    Args:
        at: "event": after each event; k: every k steps as well; "log": at steps 1, 2, 4, ... as well.

    Raises:
        SettingError: `at` is no grid.
    """

    name = "bystanders"

    def __init__(self, at: int | Literal["event", "log"] = "event") -> None:
        check_grid(at)
        self.at = at

    def __call__(self, view: View) -> Iterator[Reading]:
        for reader in view.learner.readers:
            for task in view.stream.bystanders:
                total = count_answers(view, task, reader)
                if total.n_known:
                    yield from count_readings(task, total, reader)
                    continue
                note = "the learner has no answer for this bystander: it names none of its classes"
                for metric in ("accuracy", "chance"):
                    yield Reading(task.name, metric, None, "1", reader, note=note)
