"""Episode: a batch of few-shot tasks, each with a support set to learn from and queries to answer.

Axes: B tasks; S support; Q query; C channels; H, W pixels; n ways (the most of any task).
"""

import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

UNLABELED = -1


def _inferred() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Episode:
    """Tasks of one shape.

    Args:
        support_x: (B, S, C, H, W) floating point.
        support_y: (B, S) int64: slots 0..ways-1, or `UNLABELED`.
        query_x: (B, Q, C, H, W); Q may be 0.
        query_y: (B, Q) int64 slots, or None where the answers are unknown.
        support_mask: (B, S) bool, True where a sample is present; None where all are.
        ways: (B,) int64; left out, one more than the largest label of each task.
        class_names: of every task, the names of its slots; empty where they have none.
        class_ids: (B, n) int64, what class a slot stands for, the same number wherever the class occurs; -1 for slots beyond a
            task's ways. None where unknown.
        allow_empty: a class may be without a labelled sample.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor | None = None
    support_mask: Tensor | None = None
    ways: Tensor = field(default_factory=_inferred)
    class_names: tuple[tuple[str, ...], ...] = ()
    class_ids: Tensor | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        if not len(self.ways):
            largest = self.support_y.amax(1)
            if self.query_y is not None and self.query_y.shape[1]:
                largest = torch.maximum(largest, self.query_y.amax(1))
            object.__setattr__(self, "ways", largest + 1)

    def __len__(self) -> int:
        return len(self.support_x)

    @cached_property
    def n_max(self) -> int:
        """The most ways of any task: how many logits a query gets."""
        return int(self.ways.max())

    def to(self, device: torch.device | str) -> "Episode":
        """The same episode with all tensors on `device`."""
        return self._with({name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)})

    def select(self, tasks: Tensor) -> "Episode":
        """The episode of these tasks; `tasks` is an index or a mask over B."""
        chosen: dict[str, object] = {name: value[tasks] for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.class_names:
            chosen["class_names"] = tuple(self.class_names[task] for task in torch.arange(len(self))[tasks.cpu()].tolist())
        return self._with(chosen)

    def _with(self, changes: dict[str, object]) -> "Episode":
        other = copy.copy(self)
        vars(other).pop("n_max", None)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other
