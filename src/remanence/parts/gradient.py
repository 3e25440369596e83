"""The loop of every learner that trains a classifier on a ViT by gradient steps.

Axes: B batch, C classes known, D width.
"""

from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.learner import STOP, Cursor, Footprint, Learner, Prediction, Progress, Steps, require_learnable
from remanence.parts.heads import ClassHead
from remanence.parts.hosts import VisionHost
from remanence.parts.learning_rate import warm_cosine
from remanence.parts.optimizer_state import load_moments, moments
from remanence.parts.task_book import TaskBook, columns_of
from remanence.state import State, state_bytes
from remanence.task import Data, Task, Verb

Done = tuple[Tensor | None, int]


class Batch(NamedTuple):
    """Examples of one step."""

    inputs: Tensor
    targets: Tensor


def run_verb(
    cursor: Cursor, job: tuple[Verb, str, int], begin: Callable[[], None], step: Callable[[int], Done], end: Callable[[], None]
) -> Steps:
    """The generator behind `learn` and `forget`: begin, steps from the cursor on, end.

    All that must survive a yield stands in the cursor and in the learner's state. `begin` runs when no step is done yet
    and must bear being run twice; `end` consolidates, also after STOP, but not when the generator is closed.

    Args:
        job: verb, name of the task, number of steps.
        step: number of steps done -> (loss, examples processed).
    """
    verb, task, n_steps = job
    if cursor.begin(verb, task) == 0:
        try:
            begin()
        except Exception:
            cursor.close()  # a refusal leaves no trace in the state
            raise
    while cursor.step < n_steps:
        loss, n_examples = step(cursor.step)
        cursor.step += 1
        if (yield Progress(cursor.step, n_steps, loss, n_examples)) == STOP:
            break
    end()
    cursor.close()


class GradientLearner(Learner, ABC):
    """A ViT with a head that grows by class, trained by AdamW; what is special stands in the subclass's hooks.

    The answer to a task's name, where the stream tells it, is a choice among that task's classes; without it, among all
    classes learned so far. The backbone's old task is answered by its own head, whatever happened to the features.

    `forget` is approximate here: the examples' answers are pushed towards the uniform distribution over the remaining
    classes (Golatkar et al. 2020, arXiv 1911.04933, discuss why that leaves traces), then the head rows of classes of
    which nothing is left are dropped. Optimizer moments never outlive a task. When nothing else was learned, the
    learner returns to its initial state, which is exact.

    Args:
        backbone: folder of a ViT, or a model; copied.
        epochs: passes over a task's train set.
        batch_size: examples of the task per step.
        lr: peak rate of AdamW, without weight decay; falls to zero along a cosine within each task.
        forget_epochs: passes over the forgotten examples.
        local: train each task's softmax over its own classes only (multi-head); for streams that tell the task's name.
        seed: key of all random choices.
        device: where it runs.
    """

    store = "weights"
    trains_backbone = True

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        epochs: int = 15,
        batch_size: int = 32,
        lr: float = 1e-3,
        forget_epochs: int = 3,
        local: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in (("epochs", epochs), ("batch_size", batch_size), ("lr", lr), ("forget_epochs", forget_epochs)):
            if value <= 0:
                raise SettingError(f"{type(self).__name__}: {name}={value} must be above 0.")
        self.epochs, self.batch_size, self.lr, self.forget_epochs, self.local = epochs, batch_size, lr, forget_epochs, local
        self.seed, self.device, self._source = seed, torch.device(device), backbone
        self.cursor, self.book = Cursor(), TaskBook()
        self._optimizer: torch.optim.Optimizer | None = None
        self._reset()

    def _reset(self) -> None:
        self.host = VisionHost.load(self._source).to(self.device).requires_grad_(False)
        self.host.vit.requires_grad_(self.trains_backbone)
        self.head = ClassHead(self.host.width, self.seed).to(self.device)
        self.book = TaskBook()

    # --- hooks -------------------------------------------------------------------------------------------------

    def _loss(self, task: Task, data: Data, step: int) -> tuple[Tensor, int]:
        """Loss of a learning step, and how many examples it processed; plain cross-entropy unless a subclass adds to it."""
        batch = self.batch(task, data, step)
        return self._cross_entropy(self.head(self._features(batch.inputs)), batch.targets, task), len(batch.inputs)

    def _features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.host(inputs)
        return features

    def _consolidate(self, task: Task, data: Data) -> None:
        """After the last step of a task."""

    def _retained(self, step: int) -> Batch | None:
        """Examples to keep right while another task is forgotten."""
        return None

    def _grow(self, classes: tuple[int, ...]) -> None:
        self.head.grow(classes)

    def _drop(self, task: Task, data: Data) -> None:
        """Take a forgotten task out of all that is stored beside the weights."""
        self.head.drop(self.book.remove(task))

    # --- verbs -------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> Steps:
        data = self._require(task)
        n_steps = data.steps(self.epochs, self.batch_size)
        return run_verb(
            self.cursor,
            ("learn", task.name, n_steps),
            lambda: self._begin_learning(task),
            lambda step: self._descend(lambda: self._loss(task, data, step), step, n_steps),
            lambda: self._end_learning(task, data),
        )

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        data = self._require(task)
        n_steps = data.steps(self.forget_epochs, self.batch_size)
        return run_verb(
            self.cursor,
            ("forget", task.name, n_steps),
            lambda: self._begin_forgetting(task),
            lambda step: self._descend(lambda: self._forget_loss(task, data, retain, step), step, n_steps),
            lambda: self._end_forgetting(task, data),
        )

    def _require(self, task: Task) -> Data:
        data = require_learnable(self, task)
        self.host.require_fit(data.inputs, task.name)
        return data

    def _begin_learning(self, task: Task) -> None:
        self._grow(task.classes)
        self._open_optimizer()

    def _end_learning(self, task: Task, data: Data) -> None:
        if len(data):
            self.book.add(task.name, data)
            self._consolidate(task, data)
        self._optimizer = None

    def _begin_forgetting(self, task: Task) -> None:
        self.book.require(task)
        self._open_optimizer()

    def _end_forgetting(self, task: Task, data: Data) -> None:
        self._drop(task, data)
        self._optimizer = None
        if not self.book.names():
            self._reset()

    # --- steps -------------------------------------------------------------------------------------------------

    def _descend(self, loss_of: Callable[[], tuple[Tensor, int]], step: int, n_steps: int) -> tuple[Tensor, int]:
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * warm_cosine(step, n_steps)
        # the host runs in evaluation mode, so that nothing here draws from the global generators
        with torch.enable_grad():
            loss, n_examples = loss_of()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.detach(), n_examples

    def batch(self, task: Task, data: Data, step: int) -> Batch:
        """The examples of a step, on the device."""
        rows = data.rows(step, self.batch_size, self.seed, self.cursor.verb, task.name)
        return Batch(data.inputs[rows].to(self.device), data.targets[rows].to(self.device))

    def _cross_entropy(self, logits: Tensor, targets: Tensor, task: Task) -> Tensor:
        if self.local:
            others = torch.ones(len(self.head.classes), dtype=torch.bool, device=logits.device)
            others[columns_of(self.head.classes, task.classes)] = False
            logits = logits.masked_fill(others, -torch.inf)
        return F.cross_entropy(logits, self.head.columns(targets))

    def _forget_loss(self, task: Task, data: Data, retain: Data | None, step: int) -> tuple[Tensor, int]:
        batch = self.batch(task, data, step)
        kept = columns_of(self.head.classes, self._classes_without(task)) or list(range(len(self.head.classes)))
        loss = -self.head(self._features(batch.inputs))[:, kept].log_softmax(-1).mean()
        other = self.batch(task, retain, step) if retain else self._retained(step)
        if other is None:
            return loss, len(batch.inputs)
        logits = self.head(self._features(other.inputs))
        return loss + F.cross_entropy(logits, self.head.columns(other.targets)), len(batch.inputs) + len(other.inputs)

    def _classes_without(self, task: Task) -> list[int]:
        book = TaskBook()
        book.load(self.book.state())
        book.remove(task)
        return sorted(book.all_classes())

    def _trained(self) -> list[nn.Parameter]:
        backbone = list(self.host.vit.parameters()) if self.trains_backbone else []
        return [*backbone, self.head.weight, self.head.bias]

    def _open_optimizer(self) -> None:
        self._optimizer = torch.optim.AdamW(self._trained(), lr=self.lr, weight_decay=0.0, fused=True)

    # --- reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        self.host.require_fit(inputs, task or "inputs")
        inputs = inputs.to(self.device)
        if self.host.is_old(task):
            return self.host.answer_old(self.host(inputs))
        if not self.head.classes:
            return Prediction(inputs.new_empty(len(inputs), 0), torch.empty(0, dtype=torch.int64, device=self.device))
        logits, labels = self.head(self._features(inputs)), self.head.labels(self.device)
        if task is not None and task in self.book:
            columns = columns_of(self.head.classes, self.book.classes(task))
            return Prediction(logits[:, columns], labels[columns])
        return Prediction(logits, labels)

    def footprint(self) -> Footprint:
        return Footprint(
            shared_bytes=state_bytes(self.state_dict()),
            trainable_parameters=sum(parameter.numel() for parameter in self._trained()),
        )

    def export(self, task: str | None = None) -> nn.Module:
        """Pixels (B, C, H, W) -> logits (B, classes), columns as in `predict`'s classes; a copy."""
        prediction_classes = self.head.classes if task is None else self.book.classes(task) if task in self.book else None
        if not prediction_classes:
            raise DataError(f"nothing to export for task {task!r}; learned: {', '.join(self.book.names()) or 'nothing'}.")
        columns = [column for column, label in enumerate(self.head.classes) if label in prediction_classes]
        readout = nn.Linear(self.host.width, len(columns))
        readout.load_state_dict({"weight": self.head.weight.detach()[columns], "bias": self.head.bias.detach()[columns]})
        return nn.Sequential(VisionHost.load(self.host), readout.to(self.device)).eval().requires_grad_(False)

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        return {
            "cursor": self.cursor.state_dict(),
            "book": self.book.state(),
            "head": self.head.state(),
            "backbone": dict(self.host.vit.state_dict()) if self.trains_backbone else {},
            "moments": moments(self._optimizer) if self._optimizer is not None else None,
        }

    def load_state_dict(self, state: State) -> None:
        self.cursor.load_state_dict(state["cursor"])
        self.book.load(state["book"])
        self.head.load(state["head"])
        if self.trains_backbone:
            self.host.vit.load_state_dict(state["backbone"])
        self._optimizer = None
        if state["moments"] is not None:
            self._open_optimizer()
            assert self._optimizer is not None
            load_moments(self._optimizer, state["moments"])
