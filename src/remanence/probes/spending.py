"""What a cell spent and how fast it learned, read from its ledger."""

import numpy as np
import pandas as pd

from remanence.probes.matrix import accuracy_when_learned, event_ends, is_independent, readers, taught_subjects
from remanence.probes.metrics import Result

_SUMS = ("steps", "examples", "seconds", "flops_learn")
_LAST = ("trainable_parameters", "flops_predict", "total_bytes")


def cost_of(frame: pd.DataFrame) -> dict[str, Result]:
    """The cost verb's metrics of one cell: sums over the learn events before the first forget event.

    Returns:
        metric -> Result. `bytes_per_task` is all state after the last of these events over the number of subjects
        learned by then (by the last event alone, where tasks are independent); memory is the peak; what is read from
        footprints is read after the last event.
    """
    ends = event_ends(frame)
    taught = taught_subjects(ends)
    rows = ends[ends["event"].isin(list(taught)) & (ends["subject"] == "") & ends["value"].notna()]
    rows = rows.sort_values("event", kind="stable")
    by_metric = {str(metric): group["value"] for metric, group in rows.groupby("metric")}
    results = {metric: _value(by_metric, metric, "sum") for metric in _SUMS}
    results |= {metric: _value(by_metric, metric, "last") for metric in _LAST}
    results["peak_memory_bytes"] = _value(by_metric, "peak_memory_bytes", "max")
    # independent tasks start from the base state: the state at the end is that of the last event's tasks alone
    holding = list(taught.values())[-1:] if is_independent(frame) else taught.values()
    n_subjects = len({name for names in holding for name in names})
    total = results.pop("total_bytes")
    per_task = Result(total.value / n_subjects, total.reason) if n_subjects else Result(np.nan, "nothing was learned")
    return results | {"bytes_per_task": per_task}


def _value(by_metric: dict[str, "pd.Series[float]"], metric: str, how: str) -> Result:
    values = by_metric.get(metric)
    if values is None:
        return Result(np.nan, "not measured")
    return Result(float({"sum": values.sum(), "last": values.iloc[-1], "max": values.max()}[how]))


def examples_to_learn(frame: pd.DataFrame, reader: str | None = None, share: float = 0.9) -> Result:
    """Examples processed until a subject stands at `share` of the accuracy that its event ends with; mean over subjects.

    Needs accuracy on a grid of steps (`at: log` or `at: k`); the event's end counts as its last point.
    """
    ends = event_ends(frame)
    taught = taught_subjects(ends)
    final = accuracy_when_learned(frame, reader)
    run = ends[(ends["probe"] == "run") & ends["metric"].isin(["steps", "examples"])]
    spent = run.set_index(["event", "metric"])["value"].to_dict()
    rows = frame[(frame["probe"] == "accuracy") & (frame["metric"] == "accuracy") & frame["step"].notna()]
    rows = rows[rows["reader"] == (readers(frame)[0] if reader is None else reader)]
    if not len(rows):
        return Result(np.nan, "accuracy was not measured during learning; set `at: log`")
    last = {name: event for event, names in taught.items() for name in names}
    found = []
    for (event, name), points in rows.groupby(["event", "subject"]):
        steps, examples = spent.get((event, "steps"), 0.0), spent.get((event, "examples"), np.nan)
        if last.get(str(name)) != event or name not in final or not steps > 0 or final[str(name)] <= 0:
            continue
        reached = points[points["value"] >= share * final[str(name)] - 1e-12]["step"]
        found.append(examples if not len(reached) else examples * int(reached.min()) / steps)
    return Result(float(np.mean(found))) if found else Result(np.nan, "no subject was learned above 0")
