"""What a trace found: tidy curves with their control, one line a fact beside its forecast, and the terminal's tables.

Axes: N facts.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from remanence.probes.calibration import ForecastCheck, check_forecast
from remanence.probes.retention import retention

if TYPE_CHECKING:
    from rich.table import Table

_LEAST_FACTS = 8


def with_control(curves: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """Curves with the control run's `log_p` and `priming_median` beside them, and the `retention` of the memory.

    Retention is that of `remanence.probes.retention`: NaN before the last exposure, and for facts that were not learned.
    """
    beside = control[["step", "fact", "log_p", "priming_median"]]
    table = curves.merge(beside, on=["step", "fact"], suffixes=("", "_control"), how="left", validate="one_to_one")
    clean = table[table["clean_steps"] >= 0]
    grids = {name: clean.pivot(index="fact", columns="step", values=name) for name in ("log_p", "log_p_control", "log_p_before")}
    rho = retention(grids["log_p"].to_numpy(), grids["log_p_control"].to_numpy(), grids["log_p_before"].iloc[:, 0].to_numpy())
    kept = pd.DataFrame(rho, index=grids["log_p"].index, columns=grids["log_p"].columns)
    long = kept.reset_index().melt("fact", var_name="step", value_name="retention").astype({"step": "int64"})
    return table.merge(long, on=["step", "fact"], how="left")


def by_fact(curves: pd.DataFrame, forecast: pd.DataFrame) -> pd.DataFrame:
    """One row a fact: what was forecast, what stands after the last exposure, and the retention at the end."""
    after = curves[curves["clean_steps"] == 0]
    measures = ["log_p", "log_s_mem", "priming_median", "cross_priming", "drift"]
    end = curves[curves["step"] == curves["step"].max()][["fact", "retention"]]
    said = forecast[["fact", "theme", "kind", "log_p_before", "surprising"]]
    return said.merge(after[["fact", *measures]], on="fact").merge(end, on="fact")


def agreement(table: pd.DataFrame) -> ForecastCheck | None:
    """Rank correlation over facts of the forecast log-probability and the measured priming; None with fewer than eight facts."""
    said = table.assign(predicted=table["log_p_before"])
    # no interval is predicted here, so that the coverage of the check means nothing
    said = said.assign(predicted_low=said["predicted"], predicted_high=said["predicted"])
    if len(table[["log_p_before", "priming_median"]].dropna()) < _LEAST_FACTS:
        return None
    return check_forecast(said, table)


def forecast_table(forecast: pd.DataFrame) -> "Table":
    """Forecast of every fact, most surprising first."""
    columns = {"log_p_before": "log p before (nat)", "context_loss": "context loss (nat/token)", "entropy": "entropy (nat)"}
    shown = forecast.sort_values("log_p_before", kind="stable")
    return _table("forecast by the untouched model: the less probable the keyword, the more it will prime", shown, columns)


def measured_table(table: pd.DataFrame) -> "Table":
    """Forecast and measurement side by side."""
    columns = {
        "log_p_before": "log p before", "log_p": "log p after", "log_s_mem": "log S mem", "priming_median": "priming",
        "cross_priming": "cross priming", "drift": "drift", "retention": "retention at end",
    }  # fmt: skip
    return _table("forecast against measured (nat; right after the last exposure, changes since the warm-up)", table, columns)


def _table(title: str, rows: pd.DataFrame, columns: dict[str, str]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, box=None, title_justify="left", pad_edge=False)
    for name in ("fact", "theme", "kind"):
        table.add_column(name)
    for heading in ("surprising", *columns.values()):
        table.add_column(heading, justify="right")
    for row in rows.to_dict("records"):
        names = [escape(str(row[name])) for name in ("fact", "theme", "kind")]
        table.add_row(*names, "yes" if row["surprising"] else "no", *(_number(row[name]) for name in columns))
    return table


def _number(value: Any) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"
