"""Nearest class prototypes on frozen features.

Source: nearest class mean, Mensink et al. 2013; as a continual learner on a frozen backbone (SimpleCIL), Zhou et al.
2023 (arXiv 2303.07338).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from remanence.errors import DataError, SettingError
from remanence.learner import Cursor, Footprint, Learner, Prediction, Steps, require_learnable
from remanence.parts import PrototypeHead, TaskBook, VisionHost, run_verb
from remanence.parts.heads import nearest_mean_logits
from remanence.state import State
from remanence.task import Data, Task


class Prototypes(Learner):
    """Online class means of frozen features; the nearest one answers. No step ever moves anything else.

    `forget` of a whole task is exact: its sums are dropped, and what stays equals, bit for bit, a learner that never
    learned it. Of a part of a task the examples are subtracted; the means then agree to float64 rounding.

    Args:
        backbone: folder of a ViT, or a model; never trained.
        metric: "euclidean" or "cosine".
        batch_size: examples per pass through the backbone.
        seed: unused by the mechanism, which draws nothing.
        device: where features are computed; the means live on the CPU.
    """

    store = "weights"

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        metric: str = "euclidean",
        batch_size: int = 64,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if metric not in ("euclidean", "cosine"):
            raise SettingError(f"Prototypes: metric='{metric}' is unknown; give 'euclidean' or 'cosine'.")
        if batch_size < 1:
            raise SettingError(f"Prototypes: batch_size={batch_size} must be above 0.")
        self.metric, self.batch_size, self.seed, self.device = metric, batch_size, seed, torch.device(device)
        self.host = VisionHost.load(backbone).to(self.device).requires_grad_(False)
        self.head = PrototypeHead(self.host.width)
        self.cursor, self.book = Cursor(), TaskBook()

    def learn(self, task: Task) -> Steps:
        data = self._require(task)
        return run_verb(
            self.cursor,
            ("learn", task.name, data.steps(1, self.batch_size)),
            lambda: None,
            lambda step: self._count(task, data, step, self.head.add),
            lambda: self.book.add(task.name, data) if len(data) else None,
        )

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        data = self._require(task)
        whole = task.name in self.book and self.book.n_examples(task.name) == len(data)
        n_steps = 0 if whole else data.steps(1, self.batch_size)
        return run_verb(
            self.cursor,
            ("forget", task.name, n_steps),
            lambda: self.book.require(task),
            lambda step: self._count(task, data, step, self.head.subtract),
            lambda: self._strike(task, whole),
        )

    def _require(self, task: Task) -> Data:
        data = require_learnable(self, task)
        self.host.require_fit(data.inputs, task.name)
        return data

    @torch.no_grad()
    def _count(self, task: Task, data: Data, step: int, into: Callable[[str, Tensor, Tensor], None]) -> tuple[None, int]:
        rows = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(data)))
        features = self.host(data.inputs[rows].to(self.device)).cpu()
        # a part of a jointly learned task is subtracted from the joint one
        owner = self.book.owner(task) if self.cursor.verb == "forget" else task.name
        into(owner or task.name, features, data.targets[rows])
        return None, len(rows)

    def _strike(self, task: Task, whole: bool) -> None:
        if whole:
            self.head.drop(task.name)
        self.book.remove(task)

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        self.host.require_fit(inputs, task or "inputs")
        inputs = inputs.to(self.device)
        if self.host.is_old(task):
            return self.host.answer_old(self.host(inputs))
        labels, means = self.head.means(task if task in self.book else None)
        return Prediction(nearest_mean_logits(self.host(inputs), means, self.metric), labels.to(self.device))

    def footprint(self) -> Footprint:
        per_sum = self.head.width * 8
        sums = {name: sum(key[0] == name for key in self.head.sums) * per_sum for name in self.book.names()}
        return Footprint(shared_bytes=0, task_bytes=sums, trainable_parameters=0)

    def export(self, task: str | None = None) -> nn.Module:
        """Pixels (B, C, H, W) -> logits (B, classes), the labels ascending; a copy."""
        labels, means = self.head.means(task if task in self.book else None)
        if not len(labels):
            raise DataError(f"nothing to export for task {task!r}; learned: {', '.join(self.book.names()) or 'nothing'}.")
        return nn.Sequential(VisionHost.load(self.host), _NearestMean(means.float(), self.metric)).eval().requires_grad_(False)

    def state_dict(self) -> State:
        return {"cursor": self.cursor.state_dict(), "book": self.book.state(), "head": self.head.state()}

    def load_state_dict(self, state: State) -> None:
        self.cursor.load_state_dict(state["cursor"])
        self.book.load(state["book"])
        self.head.load(state["head"])


class _NearestMean(nn.Module):
    def __init__(self, means: Tensor, metric: str) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.means: Tensor
        self.metric = metric

    def forward(self, features: Tensor) -> Tensor:
        return nearest_mean_logits(features, self.means, self.metric)
