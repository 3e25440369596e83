"""Every measurement, one tidy row each; append-only on disk.

A row's key is all of its columns but value, unit, exact and note. Appending is idempotent by key: a known key is
skipped, and a known key with another exact value raises `NotDeterministic`. A cell that died between its ledger and
its checkpoint therefore simply measures again. The file is JSON lines, synced to disk before the checkpoint is written;
a last line torn by a crash is ignored on open and cut off at the next append, nothing else is.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.errors import DataError, NotDeterministic

if TYPE_CHECKING:
    import pandas as pd

_VALUE_COLUMNS = ("value", "unit", "exact", "note")


@dataclass(frozen=True)
class Row:
    """One measurement. `step` is None for what was read after an event; `event` is -1 before the first.

    `task` is being learned or forgotten, `subject` is being measured; `at` is a position on a curve traced by the probe.
    """

    run: str
    stream: str
    learner: str
    store: str
    seed: int
    event: int
    verb: str
    task: str
    step: int | None
    probe: str
    reader: str
    subject: str
    metric: str
    at: int | None
    value: float | None
    unit: str
    exact: bool = True
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)


COLUMNS = tuple(field.name for field in fields(Row))
KEY = tuple(name for name in COLUMNS if name not in _VALUE_COLUMNS)


class Ledger:
    """The rows of one cell, on disk.

    Args:
        path: the .jsonl file; made at the first append.

    Raises:
        DataError: a line other than a torn last one is not a row.

    Example:
        >>> import tempfile
        >>> row = Row("r", "s", "l", "weights", 0, 0, "learn", "t", None, "accuracy", "", "t", "accuracy", None, 0.5, "1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ledger = Ledger(Path(folder) / "ledger.jsonl")
        ...     ledger.append([row]), ledger.append([row]), len(Ledger(ledger.path))
        (1, 0, 1)
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._rows: dict[tuple[Any, ...], Row] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        self._whole = content.rfind(b"\n") + 1
        self._is_torn = self._whole < len(content)
        for number, line in enumerate(content[: self._whole].splitlines(), 1):
            row = _parse(line, self.path, number)
            self._rows[row.key] = row

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def append(self, rows: Iterable[Row]) -> int:
        """Add rows and sync them to disk.

        Returns:
            How many were new.

        Raises:
            NotDeterministic: a key is known with another exact value.
            DataError: a value is NaN or infinite; such a measurement has value None and a note.
        """
        new: dict[tuple[Any, ...], Row] = {}
        for row in rows:
            if row.value is not None and not math.isfinite(row.value):
                raise DataError(f"{row.probe}/{row.metric} of '{row.subject}' is {row.value}; a ledger holds None with a note instead.")
            known = self._rows.get(row.key) or new.get(row.key)
            if known is None:
                new[row.key] = row
            elif row.exact and known.value != row.value:
                raise NotDeterministic(
                    f"{self.path}: {row.learner} on {row.stream}, seed {row.seed}, event {row.event} step {row.step}: {row.metric} of "
                    f"'{row.subject}' was {known.value}, now {row.value}. The machine, the data or the code changed since; "
                    f"delete the run folder to begin again."
                )
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_torn_line()
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(row)) + "\n" for row in new.values()))
                file.flush()
                os.fsync(file.fileno())
            self._rows |= new
        return len(new)

    def _cut_torn_line(self) -> None:
        # not on open: a reader beside a running cell would cut a line that is being written
        if self._is_torn:
            os.truncate(self.path, self._whole)
            self._is_torn = False

    def frame(self) -> "pd.DataFrame":
        """All rows as a tidy table in the order in which they were written."""
        return to_frame(self)

    @staticmethod
    def open(run: Path) -> "pd.DataFrame":
        """The rows of all cells of a run folder, in recipe order.

        Raises:
            DataError: the folder is no run.
        """
        run = Path(run)
        manifest = run / "run.json"
        if not manifest.exists():
            raise DataError(f"{run} is not a run folder: it has no run.json. `remanence run RECIPE` makes one and prints its path.")
        cells = json.loads(manifest.read_text(encoding="utf-8"))["cells"]
        return to_frame(row for cell in cells for row in Ledger(run / "cells" / cell / "ledger.jsonl"))


def to_frame(rows: Iterable[Row]) -> "pd.DataFrame":
    """Rows as a table with the ledger's columns; missing steps, positions and values become NA or NaN."""
    import pandas as pd

    frame = pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS))
    return frame.astype({"step": "Int64", "at": "Int64", "value": "float64", "seed": "int64", "event": "int64", "exact": "bool"})


def _parse(line: bytes, path: Path, number: int) -> Row:
    try:
        return Row(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}, line {number} is not a ledger row ({error}). Restore the file, or delete the cell's folder.") from error
