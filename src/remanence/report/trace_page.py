"""The page of `remanence trace`: how long facts are kept, how far they prime, and whether the forecast was right.

    path = write_trace_page(folder / "report.html", curves, table, about)

Self-contained, as the report of a run is; written whole or not at all.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from remanence.report.figures import DASHES, STORE_COLOURS, SYMBOLS
from remanence.state import write_whole

_COLOURS = list(STORE_COLOURS.values())
_COLUMNS = {
    "log_p_before": "log p before (nat)", "log_p": "log p after (nat)", "log_s_mem": "log S mem (nat)", "priming_median": "priming (nat)",
    "cross_priming": "cross priming (nat)", "drift": "drift (nat)", "retention": "retention at the end",
}  # fmt: skip


def write_trace_page(path: Path, curves: pd.DataFrame, table: pd.DataFrame, about: dict[str, Any]) -> Path:
    """Write the page.

    Args:
        path: where to.
        curves: a row a step and fact: step, fact, kind, clean_steps, log_p, priming_median, retention.
        table: a row a fact: fact, theme, kind, surprising, and the columns log_p_before, log_p, log_s_mem, priming_median,
            cross_priming, drift, retention.
        about: name, command, notes and environment of the trace.

    Returns:
        `path`.
    """
    clean = curves[curves["clean_steps"] >= 0]
    figures = {
        "retention": curve_figure(clean, "clean_steps", "retention", "clean steps since the last exposure", "retention"),
        "priming": curve_figure(curves, "step", "priming_median", "steps", "priming (median, nat)"),
        "forecast": scatter_figure(table),
    }
    pictures = {name: json.loads(figure.to_json()) for name, figure in figures.items() if figure is not None}
    environment = Environment(loader=PackageLoader("remanence.report", "."), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    page = environment.get_template("trace.html.j2").render(
        name=about["name"],
        command=about["command"],
        notes=about["notes"],
        made_with=" · ".join(f"{name} {value}" for name, value in about["environment"].items() if value),
        columns=_COLUMNS,
        rows=[({**row}, [_number(row[name]) for name in _COLUMNS]) for row in table.to_dict("records")],
        heights={name: picture["layout"]["height"] for name, picture in pictures.items()},
        pictures=_json(pictures),
        plotly=Markup(get_plotlyjs()),
    )
    write_whole(path, page)
    return path


def curve_figure(curves: pd.DataFrame, x: str, y: str, x_title: str, y_title: str) -> "go.Figure | None":
    """A thin line a fact and a thick one for the median of each kind, over log(1 + x); None where nothing was measured."""
    if not curves[y].notna().any():
        return None
    traces = []
    for index, (kind, group) in enumerate(curves.groupby("kind", sort=False)):
        style = {"color": _COLOURS[index % len(_COLOURS)], "dash": DASHES[index % len(DASHES)]}
        for fact, line in group.groupby("fact", sort=False):
            traces.append(_line(line, x, y, _plain(str(fact)), {**style, "width": 1}, opacity=0.35))
        middle = group.groupby(x)[[y]].median().reset_index()
        traces.append(_line(middle, x, y, f"median, {_plain(str(kind))}", {**style, "width": 3}))
    figure = _figure(traces, f"{x_title} (log scale of 1 + steps)", y_title, 380)
    shown = [value for value in sorted(set(curves[x])) if _is_round(int(value))]
    figure.update_xaxes(tickvals=np.log10(1 + np.array(shown, dtype=np.float64)).tolist(), ticktext=[str(value) for value in shown])
    return figure


def scatter_figure(table: pd.DataFrame) -> "go.Figure | None":
    """Log-probability before training against measured priming, a point a fact; None where no priming was measured."""
    kept = table.dropna(subset=["log_p_before", "priming_median"])
    if not len(kept):
        return None
    traces = [
        go.Scatter(
            x=group["log_p_before"].tolist(),
            y=group["priming_median"].tolist(),
            text=[_plain(str(fact)) for fact in group["fact"]],
            name=_plain(str(kind)),
            mode="markers",
            marker={"size": 10, "color": _COLOURS[index % len(_COLOURS)], "symbol": SYMBOLS[index % len(SYMBOLS)]},
            hovertemplate="%{text}<br>%{x:.2f} nat before, priming %{y:.2f} nat<extra>%{fullData.name}</extra>",
        )
        for index, (kind, group) in enumerate(kept.groupby("kind", sort=False))
    ]
    return _figure(traces, "log-probability of the keyword before training (nat)", "priming after the last exposure (median, nat)", 420)


def _line(points: pd.DataFrame, x: str, y: str, name: str, line: dict[str, Any], opacity: float = 1.0) -> "go.Scatter":
    return go.Scatter(
        x=np.log10(1 + points[x].to_numpy(np.float64)).tolist(),
        y=[None if np.isnan(value) else float(value) for value in points[y]],
        customdata=points[x].tolist(),
        name=name,
        mode="lines",
        line=line,
        opacity=opacity,
        showlegend=opacity == 1.0,
        hovertemplate="%{customdata} steps: %{y:.2f}<extra>%{fullData.name}</extra>",
    )


def _figure(traces: list[Any], x_title: str, y_title: str, height: int) -> "go.Figure":
    clear = "rgba(0,0,0,0)"
    figure = go.Figure(traces)
    figure.update_layout(template="none", height=height, margin={"l": 60, "r": 14, "t": 30, "b": 50})
    figure.update_layout(paper_bgcolor=clear, plot_bgcolor=clear)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, font={"size": 12})
    figure.update_xaxes(title={"text": x_title, "standoff": 8}, zeroline=False)
    figure.update_yaxes(title={"text": y_title, "standoff": 8}, zeroline=False)
    return figure


def _is_round(step: int) -> bool:
    """0, and 1, 2 or 5 times a power of ten."""
    while step and step % 10 == 0:
        step //= 10
    return step in (0, 1, 2, 5)


def _number(value: Any) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _plain(label: str) -> str:
    """A name inside a figure: plotly reads tags and %{...} there."""
    return label.replace("<", "‹").replace(">", "›").replace("%{", "% {")


def _json(pictures: dict[str, Any]) -> Markup:
    """JSON that may stand inside a script element: no "<" survives, so that no name can close it."""
    text = json.dumps(pictures, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
