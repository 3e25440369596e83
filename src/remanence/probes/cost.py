"""What knowledge costs to hold, to write and to read.

probes:
  - {call: remanence.probes.Cost}
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from remanence.learner import STOP, Learner, Progress, Steps
from remanence.probe import Probe, Reading, View
from remanence.task import Task

_N_PREDICTED = 32
_ESTIMATE = "an estimate: matrix products, convolutions and attention only"


class Cost(Probe):
    """Bytes of state, parameters trained, and FLOPs.

    Readings with subject "": `total_bytes`, `shared_bytes`, `trainable_parameters`, `flops_predict` (per example) and,
    after learn events, `flops_learn` (the whole event: the first step with its set-up, the second one times the rest,
    and consolidation, counted on a copy that learns the task once more). `task_bytes` has one subject per task.
    Seconds and peak memory are measured by the runner.
    """

    name = "cost"
    verbs = ("learn", "forget")

    def __call__(self, view: View) -> Iterator[Reading]:
        footprint = view.learner.footprint()
        yield Reading("", "total_bytes", footprint.total_bytes, "byte")
        yield Reading("", "shared_bytes", footprint.shared_bytes, "byte")
        yield Reading("", "trainable_parameters", footprint.trainable_parameters, "parameter")
        for task, n_bytes in footprint.task_bytes.items():
            yield Reading(task, "task_bytes", n_bytes, "byte")
        yield _flops_predict(view)
        if view.verb == "learn":
            yield _flops_learn(view)


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of a call: two for each multiply-add of a matrix product, a convolution or attention.

    Example:
        >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    aten = torch.ops.aten
    # torch has no formula for its own CPU attention kernel and would count it as free
    mapping: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        call()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _flops_predict(view: View) -> Reading:
    tasks = [leaf for task in view.current for leaf in task.leaves if len(leaf.test)]
    if not tasks:
        return Reading("", "flops_predict", None, "FLOP", note="the event's test sets are empty")
    inputs = tasks[0].test.inputs[:_N_PREDICTED]
    flops = count_flops(lambda: view.learner.predict(inputs, view.name_for(tasks[0]), view.learner.readers[0]))
    return Reading("", "flops_predict", flops / len(inputs), "FLOP", note=_ESTIMATE)


def _flops_learn(view: View) -> Reading:
    flops = estimate_learning(view.fork(), view.current)
    if flops is None:
        return Reading("", "flops_learn", None, "FLOP", note="the learner does not say how many steps it will take")
    return Reading("", "flops_learn", flops, "FLOP", note=_ESTIMATE)


def estimate_learning(learner: Learner, tasks: tuple[Task, ...]) -> float | None:
    """FLOPs of learning tasks, from two steps and a consolidation; trains `learner`, so give it a copy.

    Returns:
        None where the learner does not tell its number of steps.
    """
    steps = learner.learn(tasks[0]) if len(tasks) == 1 else learner.learn_many(tasks)
    last: list[Progress | None] = [None]

    def advance() -> None:
        last[0] = next(steps, None)

    first = count_flops(advance)
    progress = last[0]
    if progress is None:
        return float(first)
    if progress.steps is None:
        steps.close()
        return None
    n_more = progress.steps - progress.step
    second = count_flops(advance) if n_more > 0 else 0
    return float(first + n_more * second + count_flops(lambda: _stop(steps)))


def _stop(steps: Steps) -> None:
    """End early, with consolidation."""
    try:
        steps.send(STOP)
    except StopIteration:
        return
    for _ in steps:
        pass
