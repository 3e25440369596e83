"""Tables for the terminal, and one self-contained HTML page."""

from remanence.report.html import write_report
from remanence.report.table import compare_table

__all__ = ["compare_table", "write_report"]
