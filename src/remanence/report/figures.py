"""Plotly figures of the report: one claim each, transparent, with the same colour for the same store everywhere.

Colour tells stores apart, never learners: those have panels, labels and symbols of their own, so that the page also
reads in grey. Font and grid colours are set by the page's script, which follows the reader's dark or light setting.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from remanence.report.columns import TableRow
from remanence.report.curves import Panel

STORE_COLOURS = {
    "weights": "#1f86cc",
    "tokens": "#c77f00",
    "generated": "#009e73",
    "context": "#b8619a",
    "wiring": "#d55e00",
    "peers": "#8a8f2a",
}
"""Store -> colour; each stands out from white and from near-black."""

_UNKNOWN = "#808890"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down", "pentagon", "hexagon")


def colour_of(store: str) -> str:
    """The colour of a store; grey for one that is not known."""
    return STORE_COLOURS.get(store, _UNKNOWN)


def opacity_of(position: int, n: int) -> float:
    """Older tasks stand out: 1 for the first, 0.55 for the last."""
    return 1.0 if n < 2 else 1.0 - 0.45 * position / (n - 1)


def matrix_figure(panel: Panel) -> "go.Figure":
    """Accuracy on every task (columns) after every learn event (rows), in percent."""
    shares = 100 * panel.matrix
    small = shares.shape[1] <= 12
    heat = go.Heatmap(
        z=_lists(shares),
        x=_distinct(panel.names),
        y=_distinct(panel.event_names),
        zmin=0,
        zmax=100,
        colorscale="Cividis",
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.0f}" if small else None,
        hovertemplate="after %{y}<br>on %{x}: %{z:.1f} %<extra></extra>",
    )
    figure = _figure([heat], "accuracy (%) on", "after learning", height=90 + 34 * max(2, len(shares)))
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_xaxes(showgrid=False, automargin=True, tickangle=-35 if max(map(len, panel.names)) > 6 else 0)
    return figure


def retention_figure(panel: Panel) -> "go.Figure":
    """Accuracy of every task over the steps of the whole stream."""
    n, colour = len(panel.names), colour_of(panel.store)
    traces = []
    for position, points in panel.curves.items():
        traces.append(
            go.Scatter(
                x=[x for x, _ in points],
                y=[100 * y for _, y in points],
                name=_plain(panel.names[position]),
                mode="lines+markers",
                opacity=opacity_of(position, n),
                line={"color": colour, "dash": DASHES[position % len(DASHES)], "width": 2},
                marker={"symbol": SYMBOLS[position % len(SYMBOLS)], "size": 6, "color": colour},
                hovertemplate="%{fullData.name}<br>step %{x:.0f}: %{y:.1f} %<extra></extra>",
            )
        )
    figure = _figure(traces, "training steps", "accuracy (%)", height=260)
    figure.update_yaxes(range=[-4, 104])
    for step in panel.forgets:
        figure.add_vline(x=step, line={"dash": "dot", "width": 1.5, "color": _UNKNOWN})
        figure.add_annotation(x=step, y=1.0, yref="paper", yanchor="bottom", text="forget", showarrow=False, font={"size": 11})
    return figure


def cost_figure(rows: Sequence[TableRow], chance: float) -> "go.Figure | None":
    """Bytes of state per task against average accuracy; None where no learner has both."""
    kept = [row for row in rows if not row.is_reference and _has(row, "bytes_per_task") and _has(row, "average_accuracy")]
    if not kept:
        return None
    traces, shown = [], set()
    for index, row in enumerate(kept):
        accuracy = row.values["average_accuracy"]
        traces.append(
            go.Scatter(
                x=[max(1.0, row.values["bytes_per_task"].mean) / 1024],
                y=[100 * accuracy.mean],
                error_y=None
                if np.isnan(accuracy.half_width)
                else {"array": [100 * accuracy.half_width], "thickness": 1.2, "width": 4, "color": _UNKNOWN},
                mode="markers+text",
                text=[_plain(row.label)],
                textposition=_text_positions(kept)[index],
                marker={"size": 12, "color": colour_of(row.store), "symbol": SYMBOLS[index % len(SYMBOLS)]},
                name=row.store or "unknown",
                legendgroup=row.store,
                showlegend=row.store not in shown,
                cliponaxis=False,
                hovertemplate=f"{_plain(row.label)}<br>%{{x:.3g}} KiB per task, %{{y:.1f}} %<extra></extra>",
            )
        )
        shown.add(row.store)
    figure = _figure(traces, "state per task (KiB, log scale)", "average accuracy (%)", height=440)
    logs = [float(np.log10(trace.x[0])) for trace in traces]
    spread = max(1.0, max(logs) - min(logs))
    figure.update_xaxes(type="log", range=[min(logs) - 0.35 * spread, max(logs) + 0.35 * spread], dtick=1)
    figure.update_yaxes(range=[0, 105])
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "title": {"text": "store: "}})
    if not np.isnan(chance):
        figure.add_hline(y=100 * chance, line={"dash": "dot", "width": 1.5, "color": _UNKNOWN})
        figure.add_annotation(x=0, xref="paper", xanchor="left", y=100 * chance, yanchor="bottom", text="chance", showarrow=False)
    return figure


def erasure_figure(rows: Sequence[TableRow]) -> "go.Figure | None":
    """Accuracy on the forgotten task before (hatched) and after (solid); None where nothing was forgotten."""
    kept = [row for row in rows if not row.is_reference and _has(row, "forgotten_accuracy_after")]
    if not kept:
        return None
    labels = [_plain(row.label) for row in kept]
    colours = [colour_of(row.store) for row in kept]
    traces = []
    for when, pattern in (("before", "/"), ("after", "")):
        values = [row.values[f"forgotten_accuracy_{when}"] for row in kept]
        traces.append(
            go.Bar(
                x=labels,
                y=[100 * value.mean for value in values],
                error_y=_error_bars([100 * value.half_width for value in values]),
                name=f"{when} forgetting",
                marker={
                    "color": colours,
                    "pattern": {"shape": pattern, "fillmode": "replace"},
                    "line": {"color": colours, "width": 1.5},
                },
                hovertemplate=f"%{{x}}<br>{when}: %{{y:.1f}} %<extra></extra>",
            )
        )
    figure = _figure(traces, "", "accuracy on the forgotten (%)", height=340)
    figure.update_layout(barmode="group", showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    figure.update_xaxes(automargin=True, showgrid=False)
    figure.update_yaxes(range=[0, 105])
    return figure


def relearning_figure(panel: Panel) -> "go.Figure | None":
    """Test accuracy while the forgotten task is taught again, against a fresh learner."""
    if not panel.relearn:
        return None
    traces = []
    for points, name, dash, symbol in (
        (panel.relearn, "again", "solid", "circle"),
        (panel.fresh, "fresh learner", "dot", "square-open"),
    ):
        traces.append(
            go.Scatter(
                x=[x for x, _ in points],
                y=[100 * y for _, y in points],
                name=name,
                mode="lines+markers",
                line={"color": colour_of(panel.store), "dash": dash, "width": 2},
                marker={"symbol": symbol, "size": 7, "color": colour_of(panel.store)},
                hovertemplate="%{x:.0f} examples: %{y:.1f} %<extra>%{fullData.name}</extra>",
            )
        )
    figure = _figure(traces, "examples", "accuracy (%)", height=240)
    figure.update_yaxes(range=[-4, 104])
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"})
    return figure


def _figure(traces: list[Any], x_title: str, y_title: str, height: int) -> "go.Figure":
    figure = go.Figure(traces)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 14, "t": 24, "b": 46},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12},
        showlegend=False,
    )
    figure.update_xaxes(title={"text": x_title, "standoff": 8}, zeroline=False)
    figure.update_yaxes(title={"text": y_title, "standoff": 8}, zeroline=False)
    return figure


def _text_positions(rows: Sequence[TableRow]) -> list[str]:
    """Labels go above and below in turn along the x axis, so that neighbours do not cover each other."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].values["bytes_per_task"].mean)
    places = [""] * len(rows)
    for rank, index in enumerate(order):
        places[index] = ("top center", "bottom center")[rank % 2]
    return places


def _distinct(names: Sequence[str]) -> list[str]:
    """Labels of an axis: plotly merges equal ones, so they are numbered where two are equal."""
    plain = [_plain(name) for name in names]
    return plain if len(set(plain)) == len(plain) else [f"{number}: {name}" for number, name in enumerate(plain, 1)]


def _has(row: TableRow, metric: str) -> bool:
    return metric in row.values and not np.isnan(row.values[metric].mean)


def _lists(values: "np.ndarray[Any, np.dtype[np.float64]]") -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def _error_bars(halves: list[float]) -> dict[str, Any]:
    """Half-widths of intervals; none is drawn where one seed stands alone."""
    return {"array": [0.0 if np.isnan(half) else half for half in halves], "thickness": 1.4, "width": 4, "color": _UNKNOWN}


def _plain(label: str) -> str:
    """A name inside a figure: plotly reads tags and %{...} there."""
    return label.replace("<", "‹").replace(">", "›").replace("%{", "% {")
