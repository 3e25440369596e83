"""How large the MELODI benchmark is, its cells, and "A is no worse than B" over seeds and held-out documents."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from continual_cases import Gate
from melodi_arms import Arm
from melodi_cells import Bench, Cell

Judged = tuple[dict[str, Any], list[Gate]]


class Size(NamedTuple):
    """How large the benchmark is.

    Args:
        seeds: of arms that are judged; the first one alone of arms that are only reported.
        steps, tuning_steps, long_steps: of A1, of the choice of its rates, and of two of its arms with more training.
        ablation_steps, reported_steps: of A3's paired arms, and of the arms of A3 and A4 with one seed.
        vocabulary: byte pairs, the token that begins documents included.
        n_train_bytes, n_test_bytes: of every training and held-out document, from its beginning.
        n_ablation_bytes: of every held-out document, in A3 and A4.
        recall_steps: of A2, at most.
        n_recall: fresh samples of A2 at every G.
    """

    corpus: str
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1000
    tuning_steps: int = 300
    long_steps: int = 2000
    ablation_steps: int = 600
    reported_steps: int = 300
    vocabulary: int = 2048
    n_train_bytes: int = 560_000
    n_test_bytes: int = 131_072
    n_ablation_bytes: int = 65_536
    recall_steps: int = 2400
    n_recall: int = 512
    judged: bool = True


QUICK = {
    "seeds": (0,), "steps": 3, "tuning_steps": 1, "long_steps": 4, "ablation_steps": 2, "reported_steps": 1, "vocabulary": 300,
    "n_train_bytes": 20_000, "n_test_bytes": 2_048, "n_ablation_bytes": 2_048, "recall_steps": 3, "n_recall": 32, "judged": False,
}  # fmt: skip

class Experiment(NamedTuple):
    about: str
    cells: Callable[[Size], list[Cell]]
    judge: Callable[[Bench, Size], Judged]


def language_cell(name: str, arm: Arm, seed: int, steps: int, size: Size, lr: float, **others: Any) -> Cell:
    """A language model; `others` are arguments of `melodi_language.language` that differ from its own."""
    names = ("corpus", "vocabulary", "n_train_bytes", "n_test_bytes")
    data = {name: getattr(size, name) for name in names}
    return Cell("language", {"arm": name, "seed": seed, "steps": steps, **arm._asdict(), **data, "lr": lr, **others})


def recall_cell(name: str, arm: Arm, seed: int, size: Size) -> Cell:
    return Cell("recall", {"arm": name, "seed": seed, **arm._asdict(), "steps": size.recall_steps, "n_test": size.n_recall})


# --- statistics ----------------------------------------------------------------------------------------------------------


def bound(differences: np.ndarray, share: float, n_resamples: int = 10_000) -> float:
    """Quantile of the mean of differences (seeds, documents) under a bootstrap over both.

    All seeds are measured on the same documents. Seeds and documents are therefore drawn independently of each other: drawing documents
    anew within each seed would count one document of three seeds as three, and give an interval too narrow.

    Args:
        differences: (seeds, documents).
        share: 0.95 for the upper one-sided 95 % bound, 0.05 for the lower.

    Source: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) / n for n in differences.shape]
    return float(np.quantile(np.einsum("rs,sd,rd->r", drawn[0], differences, drawn[1]), share))


def compared(differences: np.ndarray) -> dict[str, float]:
    """Mean and both one-sided 95 % bounds."""
    mean, low, high = float(differences.mean()), bound(differences, 0.05), bound(differences, 0.95)
    return {"mean": round(mean, 4), "lower": round(low, 4), "upper": round(high, 4)}


def at_most(row: str, criterion: str, differences: np.ndarray) -> Gate:
    """A gate: the upper one-sided 95 % bound of the mean difference is not above 0."""
    found = bound(differences, 0.95)
    each = ", ".join(f"{value:+.4f}" for value in differences.mean(1))
    n_seeds, n_documents = differences.shape
    seen = f"{differences.mean():+.4f} bits per byte, upper bound {found:+.4f} ({n_seeds} seeds x {n_documents} documents; seeds: {each})"
    return Gate(row, criterion, seen, bool(found <= 0))


def best_or_within_noise(row: str, criterion: str, differences: np.ndarray) -> Gate:
    """A gate: the mean difference is not above 0, or its lower one-sided 95 % bound is not."""
    low, high = bound(differences, 0.05), bound(differences, 0.95)
    seen = f"{differences.mean():+.4f} bits per byte, 95 % bounds {low:+.4f} and {high:+.4f} ({len(differences)} seeds)"
    return Gate(row, criterion, seen, bool(low <= 0))


def judged(size: Size, gates: Iterable[Gate]) -> list[Gate]:
    return list(gates) if size.judged else []
