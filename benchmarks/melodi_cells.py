"""Cells of the MELODI benchmark: one trained and measured model each, kept as a JSON file as soon as it is done.

Cells and their folder are those of the HyperTransformer's benchmark. What is new: these cells run for minutes to a quarter of an hour, so
that each keeps a checkpoint in the folder KEY.training beside its figures and goes on from there after a kill.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hypertransformer_cells import Bench, Cell, Result

from remanence.grid import one_thread
from remanence.state import write_whole

__all__ = ["Bench", "Cell", "Result", "flushed_denormals", "run_cell"]


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers too small for their exponent count as zero, which they cost a hundred times to compute with; as before afterwards."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def run_cell(cell: Cell, folder: Path, cpu_seconds: float | None = None) -> None:
    """Train and measure one cell in this process; its figures are written whole, then its checkpoint goes."""
    import melodi_language
    import melodi_recall

    kinds = {"language": melodi_language.language, "recall": melodi_recall.recall}
    training = folder / f"{cell.key}.training"
    with one_thread(), flushed_denormals():
        figures = kinds[cell.kind](training=training, **cell.settings)
    write_whole(folder / f"{cell.key}.json", json.dumps({"kind": cell.kind, "settings": cell.settings} | figures, indent=1) + "\n")
    shutil.rmtree(training, ignore_errors=True)
