"""What the experiments of the HyperTransformer share: sizes, learning rates chosen on held-out alphabets, and "A beats B".

Every statement compares arms of equal seed, and so of equal training episodes, on the same test episodes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from continual_cases import Gate
from hypertransformer_cells import Bench, Cell, Result

Judged = tuple[dict[str, Any], list[Gate]]
TUNING_SEED = 100
RATES = {"ht": (5e-4, 1e-3, 2e-3, 4e-3), "proto": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2), "maml": (1e-2, 2e-2, 4e-2, 8e-2)}
"""Of every arm, widened until the best lay inside."""


class Size(NamedTuple):
    """How large the benchmark is."""

    seeds: tuple[int, ...]
    few: tuple[int, ...]
    steps: int
    tuning_steps: int
    stream_steps: int
    judged: bool = True


FULL = Size((0, 1, 2, 3, 4), (0, 1, 2), 1200, 400, 300)
QUICK = Size((0,), (0,), 60, 20, 20, judged=False)


class Experiment(NamedTuple):
    about: str
    cells: Callable[[Size, dict[str, float]], list[Cell]]
    judge: Callable[[Bench, Size, dict[str, float]], Judged]


# --- learning rates ----------------------------------------------------------------------------------------------------

RATES = {
    "proto": (1.6e-2, 3.2e-2, 6.4e-2, 0.128), "maml": (1e-2, 2e-2, 4e-2, 8e-2), "constpn": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    "ht": (5e-4, 1e-3, 2e-3, 4e-3), "cht": (5e-4, 1e-3, 2e-3),
}  # fmt: skip
"""Of every arm; grids were widened where the best lay at an edge."""
CNN_RATE = {"ht": "proto", "cht": "constpn"}
"""What stands in a HyperTransformer's small CNN takes the rate that the same CNN learns best at by itself."""


def tuned(bench: Bench, size: Size, run: Callable[[Cell, Path, float | None], None]) -> dict[str, float]:
    """The best rate of every arm, from short runs on held-out background alphabets; first of those that others build on."""
    rates: dict[str, float] = {}
    for arms in (("proto", "maml", "constpn"), ("ht", "cht")):
        cells = {(arm, lr): _tuning(arm, lr, size, rates) for arm in arms for lr in RATES[arm]}
        bench.run(cells.values(), run)
        for arm in arms:
            rates[arm] = max(RATES[arm], key=lambda lr, arm=arm: _score(bench.result(cells[arm, lr])))  # type: ignore[misc]
    return rates


def _tuning(arm: str, lr: float, size: Size, rates: dict[str, float]) -> Cell:
    settings = {"arm": arm, "seed": TUNING_SEED, "steps": size.tuning_steps, "lr": lr, "tuning": True} | cnn_rate(arm, rates)
    if arm in ("cht", "constpn"):
        return Cell("stream", settings | {"steps": size.tuning_steps // 2, "test_tasks": 3})
    return Cell("few-shot", settings | {"episodes": 400})


def cnn_rate(arm: str, rates: dict[str, float]) -> dict[str, float]:
    """The rate of the small CNN's own numbers, for arms that have such."""
    return {"cnn_lr": rates[CNN_RATE[arm]]} if arm in CNN_RATE else {}


def _score(result: Result) -> float:
    """Transductive and inductive accuracy, or class-incremental accuracy after the last task."""
    return float(sum(result["accuracy"].values())) if "accuracy" in result else float(np.mean(result["class"][-1]))


# --- statistics ----------------------------------------------------------------------------------------------------------


def lower_bound(differences: Sequence[float], n_resamples: int = 10_000) -> float:
    """One-sided 95 % bootstrap bound of the mean over seeds."""
    values = np.asarray(differences, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(values), size=(n_resamples, len(values)))
    return float(np.quantile(values[draws].mean(1), 0.05))


def beats(row: str, criterion: str, differences: Sequence[float], least: float = 0.0, unit: str = "points") -> Gate:
    """A gate: the lower bound of the mean difference lies above `least`."""
    bound = lower_bound(differences)
    each = ", ".join(f"{difference:+.2f}" for difference in differences)
    seen = f"{np.mean(differences):+.2f} {unit}, lower bound {bound:+.2f} ({len(differences)} seeds: {each})"
    return Gate(row, criterion, seen, bool(bound > least))


def judged(size: Size, gates: list[Gate]) -> list[Gate]:
    return gates if size.judged else []
