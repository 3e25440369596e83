"""What a HyperTransformer wrote: the weights of B tasks, self-contained.

Axes: B tasks, N images, n ways.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from remanence.generated.target import TargetNet
from remanence.state import state_bytes


@dataclass(frozen=True)
class TaskWeights:
    """Weights with a leading task axis.

    Args:
        target: the CNN that they are for.
        tensors: names as in `remanence.generated.target`, each (B, ...).
        ways: (B,) int64 classes of each task; further slots are never the answer.
        class_names: for each task, the names of its slots; may be empty.
    """

    target: TargetNet
    tensors: dict[str, Tensor]
    ways: Tensor
    class_names: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ways)

    def __getitem__(self, index: int) -> "TaskWeights":
        """One task, still with a leading axis of 1."""
        rows = range(len(self))[index]
        return TaskWeights(
            self.target, {name: value[rows : rows + 1] for name, value in self.tensors.items()}, self.ways[rows : rows + 1],
            self.class_names[rows : rows + 1],
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, recorded statistics included."""
        return state_bytes(self.tensors)

    def logits(self, x: Tensor, bn_stats: Literal["query", "support"] = "support") -> Tensor:
        """Images (B, N, C, H, W) -> logits (B, N, n)."""
        return self.target.functional(x, self.tensors, bn_stats)
