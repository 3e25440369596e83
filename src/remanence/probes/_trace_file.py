"""A trace on disk: JSON lines in one file, written whole after every probe, so that a killed run goes on where its checkpoint stands.

The first line names the settings; then comes one line a fact or a held-out loss, in order of steps. The scores before training, which all
later ones are compared with, are tensors and stand beside it in a file of their own, "NAME.before".
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from remanence.errors import StateMismatchError
from remanence.state import State, load_state, save_state, write_whole

Record = dict[str, Any]


class TraceFile:
    """Records in memory and, with a path, on disk. A record is a flat dict whose "row" says what it is.

    Args:
        path: the file; None keeps the records in memory alone.
        settings: name -> fingerprint of all that makes two traces comparable.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, str]) -> None:
        self.path, self._settings = path, dict(settings)
        self.before: State | None = None
        self.begin(None)

    @property
    def last_step(self) -> int:
        """-1 before the first probe."""
        return int(self.records[-1].get("step", -1))

    def rows(self, name: str) -> list[Record]:
        """The records of one sort, in order."""
        return [record for record in self.records if record["row"] == name]

    def begin(self, before: State | None) -> None:
        """Forget all records and start anew from the scores before training; the trace on disk stays until the first `add`."""
        self.before = before
        if before is not None and self.path is not None:
            save_state(self._before_path(self.path), before)
        self._keep([{"row": "settings", **self._settings}])

    def add(self, records: Iterable[Record]) -> None:
        """Append records and write the file."""
        self._append(records)
        # whole each time: lines are kept encoded, and a reader never sees half a step
        if self.path is not None:
            write_whole(self.path, "".join(self._lines))

    def cut(self, step: int) -> None:
        """Drop what lies beyond a step: a run that resumes there will measure it again."""
        self._keep([record for record in self.records if record.get("step", 0) <= step])

    def load(self) -> bool:
        """Read the file in place of the records in memory; False where there is none.

        Raises:
            StateMismatchError: the file is not a trace, or one of other settings.
        """
        if self.path is None or not self.path.exists():
            return False
        try:
            found = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            whole = bool(found) and found[0]["row"] == "settings" and all("step" in record for record in found[1:])
        except (ValueError, KeyError, TypeError):
            whole = False
        before = self._before_path(self.path)
        if not whole or not before.exists():
            what = f"lacks {before.name} beside it" if whole else "is not the trace of a FactTracer"
            raise StateMismatchError(f"{self.path} {what}. Delete it or give another path.")
        stored = {name: value for name, value in found[0].items() if name != "row"}
        if stored != self._settings:
            names = [name for name in self._settings if stored.get(name) != self._settings[name]]
            raise StateMismatchError(
                f"{self.path} is a trace of other settings: {', '.join(names) or 'unknown ones'} differ. Delete it or give another path."
            )
        self.before = load_state(before)
        self._keep(found)
        return True

    @staticmethod
    def _before_path(path: Path) -> Path:
        return path.with_name(f"{path.name}.before")

    def _append(self, records: Iterable[Record]) -> None:
        for record in records:
            self.records.append(record)
            self._lines.append(json.dumps(record, allow_nan=False) + "\n")

    def _keep(self, records: Iterable[Record]) -> None:
        self.records: list[Record] = []
        self._lines: list[str] = []
        self._append(records)
