"""Cells of the HyperTransformer benchmark: one trained and measured model each, kept as a JSON file as soon as it is done.

A cell is a kind (a function of `hypertransformer_few_shot` or `hypertransformer_continual`) and its settings; equal cells of several
experiments are run once. The trained model lies beside the figures, so that what only reads it needs no second training.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remanence.grid import one_thread
from remanence.state import load_state, save_state, write_whole

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A model to train and measure.

    Args:
        kind: name of the function that does it.
        settings: its arguments, JSON values.
        budget: another cell whose CPU seconds this one may use; its number of steps follows from that.
    """

    kind: str
    settings: dict[str, Any] = field(hash=False)
    budget: "Cell | None" = None

    @property
    def key(self) -> str:
        """A readable file name with a hash of all settings."""
        content = json.dumps([self.kind, self.settings, self.budget.key if self.budget else None], sort_keys=True)
        words = "-".join(str(self.settings[name]) for name in ("arm", "channels", "seed") if name in self.settings)
        return f"{self.kind}-{words}-{hashlib.sha256(content.encode()).hexdigest()[:10]}".replace(" ", "_")


class Bench:
    """The folder of finished cells.

    Args:
        folder: where figures and models lie.
        jobs: processes of one thread each.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs

    def result(self, cell: Cell) -> Result:
        """The figures of a finished cell."""
        found: Result = json.loads((self.folder / f"{cell.key}.json").read_text(encoding="utf-8"))
        return found

    def fill(self, model: nn.Module, cell: Cell) -> nn.Module:
        """Give a model of the cell's shape the parameters that the cell trained."""
        model.load_state_dict(load_state(self.folder / f"{cell.key}.safetensors"))
        return model.eval()

    def run(self, cells: Iterable[Cell], run: Callable[[Cell, Path, float | None], None]) -> None:
        """Run what is missing: first the cells that others take their budget from."""
        wanted = {cell.key: cell for cell in cells}
        wanted |= {cell.budget.key: cell.budget for cell in list(wanted.values()) if cell.budget}
        missing = [cell for cell in wanted.values() if not (self.folder / f"{cell.key}.json").exists()]
        for wave in ([cell for cell in missing if cell.budget is None], [cell for cell in missing if cell.budget is not None]):
            with ProcessPoolExecutor(self.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                running = {pool.submit(run, cell, self.folder, self._budget(cell)): cell for cell in wave}
                for index, done in enumerate(as_completed(running), 1):
                    done.result()
                    print(f"{index} of {len(wave)} cells: {running[done].key}", flush=True)

    def _budget(self, cell: Cell) -> float | None:
        return None if cell.budget is None else float(self.result(cell.budget)["cpu_seconds"])


def keep(cell: Cell, folder: Path, model: nn.Module, figures: Result) -> None:
    """Write a finished cell: the model first, so that figures are never there without it."""
    save_state(folder / f"{cell.key}.safetensors", dict(model.state_dict()))
    write_whole(folder / f"{cell.key}.json", json.dumps({"kind": cell.kind, "settings": cell.settings} | figures, indent=1) + "\n")


def run_cell(cell: Cell, folder: Path, cpu_seconds: float | None) -> None:
    """Train and measure one cell in this process."""
    import hypertransformer_continual as continual
    import hypertransformer_few_shot as few_shot

    kinds = {
        "few-shot": few_shot.few_shot, "semi": few_shot.semi_supervised,
        "stream": continual.stream, "merged": continual.merged, "minibatch": continual.minibatch, "head": continual.head_only,
    }  # fmt: skip
    with one_thread():
        torch.set_flush_denormal(True)
        model, figures = kinds[cell.kind](cpu_seconds=cpu_seconds, **cell.settings)
    keep(cell, folder, model, figures)
