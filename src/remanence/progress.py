"""What the person who waits sees: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from remanence.grid import Cell
    from remanence.learner import Progress as Step

_SECONDS_BETWEEN_LINES = 10.0


def terminal() -> Console:
    """Where commands print."""
    # without a terminal rich assumes 80 columns, too few for the tables
    return Console(width=None if sys.stdout.isatty() else 120)


class WorkProgress:
    """Progress of artifacts and cells; use it as a context manager.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._is_live = console, console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, transient=True)
        self._ids: dict[str, int] = {}
        self._start = self._last_line = time.monotonic()
        self._n_cells = self._n_done = 0

    def __enter__(self) -> Self:
        if self._is_live:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_live:
            self._bars.stop()

    def artifact(self, name: str, step: "Step") -> None:
        """A step of building an artifact."""
        self._advance(f"pretraining {name}", step.step, step.steps or 0)

    def steps(self, label: str, done: int, total: int) -> None:
        """Steps of whatever the label names."""
        self._advance(label, done, total)

    def begin_cells(self, n_cells: int) -> None:
        """The cells begin."""
        self._n_cells = n_cells
        if self._is_live:
            self._advance("cells", 0, n_cells)

    def cell(self, cell: "Cell", done: int, total: int) -> None:
        """An event of a cell is done."""
        if done < total:
            return
        self._n_done += 1
        if self._is_live:
            self._advance("cells", self._n_done, self._n_cells)
        else:
            name = f"{cell.learner} on '{cell.stream}', seed {cell.seed}"
            self._line(f"[{self._n_done}/{self._n_cells}] {name} ({time.monotonic() - self._start:.0f} s)")

    def _advance(self, label: str, done: int, total: int) -> None:
        if self._is_live:
            if label not in self._ids:
                self._ids[label] = self._bars.add_task(label, total=total)
            self._bars.update(self._ids[label], completed=done)  # type: ignore[arg-type]
        elif done == total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line(f"{label}: {done}/{total}")

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
