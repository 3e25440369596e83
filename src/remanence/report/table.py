"""The five-verb table for a terminal.

    rich.print(compare_table([Ledger.open(run)]))

It stands in as few blocks as the width allows: one from about 170 columns, two at 120, more when narrower.
"""

from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from remanence.report.columns import COLUMNS, Column, TableRow, table_rows


def compare_table(frames: Sequence[pd.DataFrame]) -> "FiveVerbTable":
    """Compare all learners of one or several runs by the five verbs: mean ± half of the 95 % interval over seeds.

    Args:
        frames: one ledger frame per run, as from `Ledger.open`.

    Returns:
        A rich renderable.
    """
    return FiveVerbTable(table_rows(frames))


class FiveVerbTable:
    """Renders rows in as many blocks as the width asks for; a verb is never torn apart."""

    def __init__(self, rows: list[TableRow]) -> None:
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.rows:
            yield "Nothing was measured yet."
            return
        for columns in self._blocks(console, options):
            yield self._table(columns)

    def _blocks(self, console: Console, options: ConsoleOptions) -> list[list[Column]]:
        """Verbs together as long as they fit; a single verb that does not is left to rich to fold."""
        blocks: list[list[Column]] = []
        for verb in dict.fromkeys(column.verb for column in COLUMNS):
            columns = [column for column in COLUMNS if column.verb == verb]
            if blocks:
                together = self._table(blocks[-1] + columns)
                if Measurement.get(console, options.update(max_width=10_000), together).maximum <= options.max_width:
                    blocks[-1] += columns
                    continue
            blocks.append(columns)
        return blocks

    def _table(self, columns: list[Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("\nlearner", overflow="fold", min_width=8)
        verbs = [""] + [column.verb for column in columns]
        for before, column in zip(verbs, columns, strict=False):
            verb = f"[bold]{column.verb}[/bold]" if column.verb != before else ""
            table.add_column(f"{verb}\n{column.title}", justify="right", no_wrap=True)
        first = next((index for index, row in enumerate(self.rows) if row.is_reference), len(self.rows))
        for index, row in enumerate(self.rows):
            if row.is_reference and not any(column.metrics[0] in row.values for column in columns):
                continue
            if index == first:
                table.add_section()
            table.add_row(_plain(row.label), *(column.cell(row.values) for column in columns), style="dim" if row.is_reference else "")
        return table


def _plain(label: str) -> str:
    """A name is never read as rich markup."""
    return label.replace("[", r"\[")
