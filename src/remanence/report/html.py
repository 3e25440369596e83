"""One self-contained HTML page of a run: it opens offline, on a phone, in the dark, and prints.

    path = write_report(run_folder)

Plotly's script stands in the page once; figures are JSON that a small script draws. The page is written whole or not
at all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from remanence.ledger import Ledger
from remanence.probes import five_verbs
from remanence.probes.verbs import CHANCE, VERBS
from remanence.report import figures
from remanence.report.columns import COLUMNS, MISSING, TableRow, table_rows
from remanence.report.curves import Panel, panels
from remanence.state import write_whole

_DASH_ARRAYS = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4"}


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run_folder: a finished or interrupted run; what was measured so far is shown.
        out: where to; `report.html` in the run folder by default.

    Returns:
        The page's path.

    Raises:
        DataError: the folder is no run.
    """
    run_folder = Path(run_folder)
    frame = Ledger.open(run_folder)
    manifest = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    path = run_folder / "report.html" if out is None else Path(out)
    write_whole(path, render(frame, manifest))
    return path


def render(frame: pd.DataFrame, manifest: dict[str, Any]) -> str:
    """The page as text.

    Args:
        frame: all rows of the run.
        manifest: the content of run.json.
    """
    rows, shown = table_rows([frame]), panels(frame)
    pictures: dict[str, Any] = {}
    environment = Environment(loader=PackageLoader("remanence.report", "."), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    template = environment.get_template("report.html.j2")
    return template.render(
        manifest=manifest,
        about=manifest.get("recipe", {}).get("about", "Where should new knowledge live? One run, five verbs."),
        facts=_facts(manifest, frame),
        verbs=[(verb, sum(column.verb == verb for column in COLUMNS)) for verb in VERBS],
        columns=COLUMNS,
        rows=[(row, [(column.cell(row.values), column.note(row.values)) for column in COLUMNS]) for row in rows],
        missing=MISSING,
        colour_of=figures.colour_of,
        sections=_sections(rows, shown, pictures),
        tasks=_task_legend(shown),
        details=_details(frame),
        notes=_notes(frame),
        pictures=_json(pictures),
        plotly=Markup(get_plotlyjs()),
    )


def _facts(manifest: dict[str, Any], frame: pd.DataFrame) -> list[tuple[str, str]]:
    """What the run is: label and value."""
    seeds = [str(seed) for seed in manifest.get("seeds", sorted(set(frame["seed"])))]
    facts = [("command", manifest.get("command", "")), ("seeds", ", ".join(seeds)), ("expected", manifest.get("expect") or "")]
    environment = manifest.get("environment", {})
    facts.append(("made with", " · ".join(f"{name} {value}" for name, value in environment.items() if value)))
    return [(name, str(value)) for name, value in [*facts, ("run", manifest.get("run", ""))] if value]


def _sections(rows: list[TableRow], shown: list[Panel], pictures: dict[str, Any]) -> dict[str, list[tuple[str, str, int]]]:
    """Section -> (title, id, height in pixels) of its figures; the figures themselves go into `pictures`."""
    chance = [row.values["average_accuracy"].mean for row in rows if row.learner == CHANCE and "average_accuracy" in row.values]
    plan: dict[str, list[tuple[str, Any]]] = {
        "matrix": [(panel.label, figures.matrix_figure(panel)) for panel in shown],
        "retention": [(panel.label, figures.retention_figure(panel)) for panel in shown if panel.curves],
        "cost": [("", figures.cost_figure(rows, chance[0] if chance and max(chance) - min(chance) < 0.005 else np.nan))],
        "erasure": [("", figures.erasure_figure(rows))],
        "relearning": [(panel.label, figures.relearning_figure(panel)) for panel in shown],
    }
    sections: dict[str, list[tuple[str, str, int]]] = {}
    for section, plots in plan.items():
        sections[section] = []
        for title, figure in plots:
            if figure is not None:
                identity = f"{section}-{len(sections[section])}"
                pictures[identity] = json.loads(figure.to_json())
                sections[section].append((title, identity, int(figure.layout.height)))
    return sections


def _task_legend(shown: Sequence[Panel]) -> list[tuple[str, str, float]]:
    """(name, dash array, opacity) of each task's line, for all retention panels at once; positions where names differ."""
    n = max((len(panel.names) for panel in shown), default=0)
    legend = []
    for position in range(n):
        names = {panel.names[position] for panel in shown if position < len(panel.names)}
        dash = _DASH_ARRAYS[figures.DASHES[position % len(figures.DASHES)]]
        legend.append((names.pop() if len(names) == 1 else f"task {position + 1}", dash, figures.opacity_of(position, n)))
    return legend


def _details(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Every metric of every learner, as text."""
    table = five_verbs(frame)
    return [
        {
            "learner": " · ".join(part for part in (str(row.learner), str(row.reader)) if part),
            "stream": str(row.stream),
            "verb": str(row.verb),
            "metric": str(row.metric).replace("_", " "),
            "mean": f"{row.mean:.4g}",
            "interval": MISSING if np.isnan(row.low) else f"{row.low:.4g} … {row.high:.4g}",  # type: ignore[arg-type]
            "unit": "" if row.unit == "1" else str(row.unit),
            "n": str(row.n),
        }
        for row in table.itertuples()
        if int(row.n) > 0  # type: ignore[arg-type]
    ]


def _notes(frame: pd.DataFrame) -> list[dict[str, str]]:
    """What has no value, for whom, and why; one line per reason."""
    table = five_verbs(frame)
    table = table[table["note"] != ""]
    return [
        {
            "note": str(note),
            "metrics": ", ".join(dict.fromkeys(metric.replace("_", " ") for metric in group["metric"])),
            "learners": ", ".join(dict.fromkeys(group["learner"] + " @ " + group["stream"])),
        }
        for note, group in table.groupby("note", sort=False)
    ]


def _json(pictures: dict[str, Any]) -> Markup:
    """JSON that may stand inside a script element: no "<" survives, so that no name can close it."""
    text = json.dumps(pictures, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
