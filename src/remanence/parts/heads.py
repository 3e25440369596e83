"""Read-outs that grow by class and speak the source's labels.

Axes: B batch, C classes held, D width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.keys import generator
from remanence.state import State


class ClassHead(nn.Module):
    """A linear classifier whose rows are added and dropped by source label.

    A new row depends on (seed, label) alone, so that the order in which classes arrive leaves no trace in it.

    Args:
        width: D.
        seed: key of the initialisation, N(0, 0.02).
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.classes: list[int] = []
        self.weight = nn.Parameter(torch.empty(0, width))
        self.bias = nn.Parameter(torch.empty(0))
        # labels in ascending order and the columns they stand in: made when rows change, read at every step
        self.register_buffer("_sorted", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("_column", torch.empty(0, dtype=torch.int64), persistent=False)
        self._sorted: Tensor
        self._column: Tensor
        self._is_sorted = True

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C) logits."""
        return F.linear(features, self.weight, self.bias)

    def grow(self, classes: Iterable[int]) -> None:
        """Add rows for the labels that are new."""
        new = [label for label in classes if label not in self.classes]
        if not new:
            return
        rows = [torch.randn(self.weight.shape[1], generator=generator(self.seed, "head", label)) * 0.02 for label in new]
        self._replace(
            torch.cat([self.weight.detach(), torch.stack(rows).to(self.weight)]),
            torch.cat([self.bias.detach(), self.bias.new_zeros(len(new))]),
            [*self.classes, *new],
        )

    def drop(self, classes: Iterable[int]) -> Tensor:
        """Remove rows; returns the indices of those that stay."""
        gone = set(classes)
        kept = torch.tensor(
            [row for row, label in enumerate(self.classes) if label not in gone], dtype=torch.int64, device=self.weight.device
        )
        self._replace(self.weight.detach()[kept], self.bias.detach()[kept], [label for label in self.classes if label not in gone])
        return kept

    def columns(self, targets: Tensor) -> Tensor:
        """(B,) source labels -> (B,) column numbers; every label must be held."""
        places = torch.searchsorted(self._sorted, targets)
        return places if self._is_sorted else self._column[places]

    def labels(self, device: torch.device | str = "cpu") -> Tensor:
        """(C,) source labels of the columns."""
        return torch.tensor(self.classes, dtype=torch.int64, device=device)

    def state(self) -> State:
        return {"classes": list(self.classes), "weight": self.weight.detach(), "bias": self.bias.detach()}

    def load(self, state: State) -> None:
        """Become what `state()` described; copies."""
        self._replace(state["weight"].to(self.weight).clone(), state["bias"].to(self.bias).clone(), list(state["classes"]))

    def _replace(self, weight: Tensor, bias: Tensor, classes: list[int]) -> None:
        self.weight, self.bias, self.classes = nn.Parameter(weight), nn.Parameter(bias), classes
        self._sorted, self._column = self.labels(weight.device).sort()
        self._is_sorted = classes == sorted(classes)


class PrototypeHead:
    """Class means as a sum and a count per (task, class): exact to add, merge and take out again.

    Sums run in float64, so that the means agree to 1e-5 whatever the order and the batching. Since a task's sums are
    kept apart, forgetting a whole task leaves exactly what was there without it.

    Args:
        width: D.

    Source: nearest class mean, Mensink et al. 2013 (IEEE TPAMI 35(11)); on frozen features as SimpleCIL, Zhou et al.
        2023 (arXiv 2303.07338).

    Example:
        >>> head = PrototypeHead(2)
        >>> head.add("t", torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]), torch.tensor([7, 7, 9]))
        >>> head.means()[1].tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}

    def add(self, task: str, features: Tensor, targets: Tensor) -> None:
        """Count in features (B, D) of source labels (B,)."""
        self._accumulate(task, features, targets, 1)

    def subtract(self, task: str, features: Tensor, targets: Tensor) -> None:
        """Take examples out again; a class of which none is left vanishes."""
        self._accumulate(task, features, targets, -1)

    def _accumulate(self, task: str, features: Tensor, targets: Tensor, sign: int) -> None:
        labels, inverse = torch.unique(targets, return_inverse=True)
        sums = features.new_zeros(len(labels), self.width, dtype=torch.float64).index_add_(0, inverse, features.double())
        for label, total, count in zip(labels.tolist(), sums.cpu(), torch.bincount(inverse).tolist(), strict=True):
            key = (task, label)
            self.counts[key] = self.counts.get(key, 0) + sign * count
            self.sums[key] = self.sums.get(key, torch.zeros(self.width, dtype=torch.float64)) + sign * total
            if self.counts[key] <= 0:
                del self.counts[key], self.sums[key]

    def drop(self, task: str) -> None:
        """Forget all that a task added."""
        for key in [key for key in self.sums if key[0] == task]:
            del self.sums[key], self.counts[key]

    def means(self, task: str | None = None) -> tuple[Tensor, Tensor]:
        """Source labels (C,) ascending and their means (C, D) in float64; of one task, or over all."""
        keys = sorted((key for key in self.sums if task in (None, key[0])), key=lambda key: (key[1], key[0]))
        labels = sorted({label for _, label in keys})
        if not labels:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, self.width, dtype=torch.float64)
        rows = {label: row for row, label in enumerate(labels)}
        index = torch.tensor([rows[label] for _, label in keys])
        sums = torch.zeros(len(labels), self.width, dtype=torch.float64).index_add_(0, index, torch.stack([self.sums[key] for key in keys]))
        counts = torch.zeros(len(labels), dtype=torch.float64).index_add_(
            0, index, torch.tensor([self.counts[key] for key in keys], dtype=torch.float64)
        )
        return torch.tensor(labels), sums / counts[:, None]

    def state(self) -> State:
        keys = sorted(self.sums)
        return {
            "keys": [list(key) for key in keys],
            "counts": [self.counts[key] for key in keys],
            "sums": torch.stack([self.sums[key] for key in keys]) if keys else torch.empty(0, self.width, dtype=torch.float64),
        }

    def load(self, state: State) -> None:
        """Become what `state()` described; copies."""
        keys = [(task, label) for task, label in state["keys"]]
        self.sums = {key: row.clone() for key, row in zip(keys, state["sums"].cpu(), strict=True)}
        self.counts = dict(zip(keys, state["counts"], strict=True))


def nearest_mean_logits(features: Tensor, means: Tensor, metric: str) -> Tensor:
    """Similarity of features (B, D) to class means (C, D): minus squared distance, or cosine over temperature 0.1.

    Returns:
        (B, C).
    """
    means = means.to(features)
    if metric == "cosine":
        return F.normalize(features, dim=1) @ F.normalize(means, dim=1).T / 0.1
    # the faster way by a matrix product, taken for large batches only, loses digits: answers would depend on the batch
    return -torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist").square()
