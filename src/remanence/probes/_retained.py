"""Retention of a traced run against a traced control run, step by step and fact by fact."""

import numpy as np
import pandas as pd

from remanence.errors import DataError
from remanence.probes.retention import half_life, retention


def retained(run: pd.DataFrame, control: pd.DataFrame, last_exposure: int) -> pd.DataFrame:
    """The table that `FactTracer.retention` promises.

    Args:
        run: curves of the run with exposures.
        control: curves of the paired run, of the same facts.
        last_exposure: steps done when the last exposure was learned.

    Raises:
        DataError: that step is absent from one of them.
    """
    ours, theirs = (table[table["step"] >= last_exposure] for table in (run, control))
    both = ours.merge(theirs[["step", "fact", "log_p", "priming_median"]], on=["step", "fact"], suffixes=("", "_control"))
    if last_exposure not in set(both["step"]):
        first = [sorted(set(table["step"]))[:5] for table in (ours, theirs)]
        raise DataError(
            f"step {last_exposure}, right after the last exposure, was not probed in both runs (ours from there on: {first[0]}, the "
            f"control's: {first[1]}). Give the control the same every and last_exposure={last_exposure}, and train both beyond it."
        )
    wide = both.pivot(index="fact", columns="step", values=["log_p", "log_p_control", "priming_median", "priming_median_control"])
    before = both.groupby("fact")["log_p_before"].first()
    memory = retention(wide["log_p"], wide["log_p_control"], before)
    priming = retention(wide["priming_median"], wide["priming_median_control"], before)
    steps = wide["log_p"].columns.to_numpy()
    fact, step = wide.index.get_indexer(pd.Index(both["fact"])), np.searchsorted(steps, both["step"])
    columns = ["step", "fact", "theme", "kind", "log_p", "log_p_control"]
    table = both[columns].rename(columns={"log_p_control": "control_log_p"})
    table.insert(1, "clean_steps", table["step"] - last_exposure)
    return table.assign(
        retention=memory[fact, step],
        half_life=half_life(steps - last_exposure, memory)[fact],
        priming_retention=priming[fact, step],
        priming_half_life=half_life(steps - last_exposure, priming)[fact],
    )
