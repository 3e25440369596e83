"""What the experiments of the HyperTransformer share: sizes, learning rates chosen on held-out alphabets, and "A beats B".

Every statement compares arms of equal seed, and so of equal training episodes, on the same test episodes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from continual_cases import Gate
from hypertransformer_cells import Bench, Cell

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



def tuning_cells(size: Size) -> list[Cell]:
    """Shorter runs on held-out background alphabets: four rates of each arm."""
    return [_tuning(arm, lr, size) for arm, rates in RATES.items() for lr in rates]


def _tuning(arm: str, lr: float, size: Size) -> Cell:
    return Cell("few-shot", {"arm": arm, "seed": TUNING_SEED, "steps": size.tuning_steps, "lr": lr, "tuning": True, "episodes": 400})


def tuned(bench: Bench, size: Size) -> dict[str, float]:
    """The rate of every arm with the best sum of transductive and inductive accuracy."""

    def score(arm: str, lr: float) -> float:
        return float(sum(bench.result(_tuning(arm, lr, size))["accuracy"].values()))

    return {arm: max(rates, key=lambda lr: score(arm, lr)) for arm, rates in RATES.items()}


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
