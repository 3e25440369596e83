"""Finished runs of a trace on disk, so that the same command goes on behind them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from remanence.errors import SettingError
from remanence.state import write_whole

_FOLDER = "finished"


def open_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Claim a folder for a trace.

    Raises:
        SettingError: it holds something else, or a trace with other settings.
    """
    path = folder / "plan.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["hash"] != plan["hash"]:
            differing = [name for name in plan if name not in ("hash", "command", "name") and earlier.get(name) != plan[name]]
            raise SettingError(
                f"{folder} holds a trace of another {', another '.join(differing)}; give another --out, or delete that folder."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} exists and holds no trace; give --out a new folder.")
    write_whole(path, json.dumps(plan, indent=1))


def finished(folder: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Curves and held-out losses of a run; None where it has not come to its end."""
    path = folder / _FOLDER / f"{name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    curves, held_out = (pd.DataFrame(content[part]["rows"], columns=content[part]["columns"]) for part in ("curves", "held_out"))
    names = {"step", "clean_steps", "fact", "theme", "kind"}
    return curves.astype({name: "float64" for name in curves.columns if name not in names}), held_out


def keep(folder: Path, name: str, curves: pd.DataFrame, held_out: pd.DataFrame) -> None:
    """Write a run, whole."""
    # Python writes floats so that they are read back bit for bit
    tables = {"curves": curves, "held_out": held_out}
    content = {part: {"columns": list(table.columns), "rows": table.to_numpy(object).tolist()} for part, table in tables.items()}
    write_whole(folder / _FOLDER / f"{name}.json", json.dumps(content))
