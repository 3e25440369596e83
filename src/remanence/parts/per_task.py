"""Learners on a frozen ViT in which every task owns its parameters: adapters, memory tokens, prompts.

Axes: B batch, C classes of a task, T tasks learned, D width.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import ErasureNotSupported, SettingError
from remanence.learner import Cursor, Footprint, Learner, Prediction, Steps, require_learnable
from remanence.parts.gradient import run_verb
from remanence.parts.heads import PrototypeHead, nearest_mean_logits
from remanence.parts.hosts import VisionHost
from remanence.parts.learning_rate import warm_cosine
from remanence.parts.optimizer_state import load_moments, moments
from remanence.parts.task_book import TaskBook
from remanence.state import State, state_bytes
from remanence.task import Data, Task

Router = Literal["prototype", "energy", "confidence", "oracle"]
_ROUTERS = ("prototype", "energy", "confidence", "oracle")


class PerTaskLearner(Learner, ABC):
    """Adds something of its own for every task; what that is stands in the subclass's hooks.

    Tasks never share a trained number, so that nothing is disturbed and `forget` of a task is exact: what stays equals,
    bit for bit, a learner that never learned it. A part of a task cannot be taken out.

    Args:
        backbone: folder of a ViT, or a model; never trained.
        router: how a task is chosen where the stream does not tell its name.
            "prototype": the task of the class mean that is nearest on the frozen features; costs one mean per class.
            "energy": the task with the largest logsumexp of its logits; "confidence": the largest probability. Both
            compare heads that were never trained together; expect little of them.
            "oracle": never chosen; the name is needed.
        epochs: passes over a task's train set.
        batch_size: examples per step.
        lr: peak rate of AdamW; falls to zero along a cosine within each task.
        seed: key of all random choices.
        device: where it runs.
    """

    weight_decay = 0.0
    warm_share = 0.0
    clip_norm: float | None = None

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        router: Router,
        epochs: int,
        batch_size: int,
        lr: float,
        seed: int,
        device: str | torch.device,
    ) -> None:
        for name, value in (("epochs", epochs), ("batch_size", batch_size), ("lr", lr)):
            if value <= 0:
                raise SettingError(f"{type(self).__name__}: {name}={value} must be above 0.")
        if router not in _ROUTERS:
            raise SettingError(f"{type(self).__name__}: router='{router}' is unknown; give one of {', '.join(_ROUTERS)}.")
        self.router, self.epochs, self.batch_size, self.lr = router, epochs, batch_size, lr
        self.seed, self.device = seed, torch.device(device)
        self.needs_task_id = router == "oracle"
        self.host = VisionHost.load(backbone).to(self.device).requires_grad_(False)
        self.cursor, self.book = Cursor(), TaskBook()
        self.prototypes = PrototypeHead(self.host.width)
        self._optimizer: torch.optim.Optimizer | None = None

    # --- hooks -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _tasks(self) -> list[str]:
        """Tasks that own something, in order of arrival."""

    @abstractmethod
    def _attach(self, task: str, classes: list[int]) -> None:
        """Give a task what is its own, drawn from (seed, task) alone; of a known task only the head may grow."""

    @abstractmethod
    def _detach(self, task: str) -> None:
        """Delete all that a task owns."""

    @abstractmethod
    def _logits(self, inputs: Tensor, task: str) -> Tensor:
        """(B, C) answers of a task."""

    @abstractmethod
    def _classes(self, task: str) -> list[int]:
        """Source labels of the C columns."""

    @abstractmethod
    def _parameters(self, task: str) -> list[nn.Parameter]:
        """What a step on this task trains."""

    @abstractmethod
    def _state(self, task: str) -> State:
        """All tensors that a task owns."""

    @abstractmethod
    def _load(self, task: str, state: State) -> None:
        """Copy a task's tensors in, after `_attach`."""

    def _plain_features(self, inputs: Tensor) -> Tensor:
        """(B, D) features of the untouched backbone."""
        features: Tensor = self.host(inputs)
        return features

    def _training_logits(self, task: Task, data: Data, rows: Tensor) -> Tensor:
        """(B, C) answers to rows of the train set; override it to read a cache."""
        return self._logits(data.inputs[rows].to(self.device), task.name)

    # --- verbs -------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> Steps:
        data = require_learnable(self, task)
        self.host.require_fit(data.inputs, task.name)
        n_steps = data.steps(self.epochs, self.batch_size)
        return run_verb(
            self.cursor,
            ("learn", task.name, n_steps),
            lambda: self._begin(task, data),
            lambda step: self._step(task, data, step, n_steps),
            lambda: self._end(task, data),
        )

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        data = require_learnable(self, task)
        return run_verb(
            self.cursor,
            ("forget", task.name, 0),
            lambda: self._require_whole(task, data),
            lambda step: (None, 0),
            lambda: self._discard(task),
        )

    def _begin(self, task: Task, data: Data) -> None:
        if len(data):
            self._attach(task.name, list(task.classes))
            self._open_optimizer(task.name)

    def _step(self, task: Task, data: Data, step: int, n_steps: int) -> tuple[Tensor, int]:
        optimizer = self._optimizer
        assert optimizer is not None
        rows = data.rows(step, self.batch_size, self.seed, "learn", task.name)
        targets = data.targets[rows].to(self.device)
        columns = (targets[:, None] == torch.tensor(self._classes(task.name), device=self.device)).int().argmax(1)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * warm_cosine(step, n_steps, self.warm_share)
        # the host runs in evaluation mode, so that nothing here draws from the global generators
        with torch.enable_grad():
            loss = F.cross_entropy(self._training_logits(task, data, rows), columns)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters(task.name), self.clip_norm)
        optimizer.step()
        return loss.detach(), len(rows)

    def _end(self, task: Task, data: Data) -> None:
        self._optimizer = None
        if not len(data):
            return
        self.book.add(task.name, data)
        if self.router == "prototype":
            with torch.no_grad():
                self.prototypes.add(task.name, self._plain_features(data.inputs.to(self.device)), data.targets.to(self.device))

    def _require_whole(self, task: Task, data: Data) -> None:
        self.book.require(task)
        if task.name not in self.book or self.book.n_examples(task.name) != len(data):
            owner = self.book.owner(task)
            raise ErasureNotSupported(
                f"{type(self).__name__} took '{task.name}' in as a part of '{owner}' ({self.book.n_examples(owner or '')} examples, asked "
                f"to forget {len(data)}); what a task owns goes out whole or not at all. Forget '{owner}', or learn in smaller tasks."
            )

    def _discard(self, task: Task) -> None:
        self.book.remove(task)
        self.prototypes.drop(task.name)
        self._detach(task.name)

    def _open_optimizer(self, task: str) -> None:
        parameters = [parameter.requires_grad_(True) for parameter in self._parameters(task)]
        self._optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    # --- reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        self.host.require_fit(inputs, task or "inputs")
        inputs = inputs.to(self.device)
        if task is not None and task in self._tasks():
            return Prediction(self._logits(inputs, task), torch.tensor(self._classes(task), device=self.device))
        if self.host.is_old(task):
            return self.host.answer_old(self._plain_features(inputs))
        if self.router == "oracle" and self._tasks() and task is None:
            raise SettingError(
                f"{type(self).__name__} with router: oracle must be told the task's name; use a stream with task_id_at_test, or "
                f"router: prototype."
            )
        return self._answer_routed(inputs)

    def _answer_routed(self, inputs: Tensor) -> Prediction:
        """Each row is answered by the task that the router chose for it; the other tasks' classes get -inf."""
        labels = torch.tensor(sorted(self.book.all_classes()), dtype=torch.int64, device=self.device)
        logits = torch.full((len(inputs), len(labels)), -torch.inf, device=self.device)
        chosen = self._route(inputs)
        for index, task in enumerate(self.book.names()):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                columns = torch.searchsorted(labels, torch.tensor(self._classes(task), device=self.device))
                logits[rows[:, None], columns[None, :]] = self._logits(inputs[rows], task).to(logits.dtype)
        return Prediction(logits, labels)

    def _route(self, inputs: Tensor) -> Tensor:
        """(B,) index of the chosen task in `book.names()`."""
        names = self.book.names()
        if len(names) < 2 or self.router == "oracle":
            return torch.zeros(len(inputs), dtype=torch.int64, device=self.device)
        if self.router == "prototype":
            features = self._plain_features(inputs)
            scores = [nearest_mean_logits(features, self.prototypes.means(name)[1], "euclidean").amax(1) for name in names]
        elif self.router == "energy":
            scores = [self._logits(inputs, name).logsumexp(1) for name in names]
        else:
            scores = [self._logits(inputs, name).softmax(1).amax(1) for name in names]
        return torch.stack(scores, 1).argmax(1)

    def footprint(self) -> Footprint:
        mean_bytes = self.host.width * 8
        n_means = {name: sum(key[0] == name for key in self.prototypes.sums) for name in self._tasks()}
        sizes = {name: state_bytes(self._state(name)) + n_means[name] * mean_bytes for name in self._tasks()}
        n_trained = sum(parameter.numel() for parameter in self._parameters(self._tasks()[-1])) if self._tasks() else 0
        return Footprint(shared_bytes=0, task_bytes=sizes, trainable_parameters=n_trained)

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        return {
            "cursor": self.cursor.state_dict(),
            "book": self.book.state(),
            "prototypes": self.prototypes.state(),
            "tasks": {name: {"classes": self._classes(name), "tensors": self._state(name)} for name in self._tasks()},
            "moments": moments(self._optimizer) if self._optimizer is not None else None,
        }

    def load_state_dict(self, state: State) -> None:
        for name in reversed(self._tasks()):  # a task may rest on earlier ones
            self._detach(name)
        for name, owned in state["tasks"].items():
            self._attach(name, owned["classes"])
            self._load(name, owned["tensors"])
        self.cursor.load_state_dict(state["cursor"])
        self.book.load(state["book"])
        self.prototypes.load(state["prototypes"])
        self._optimizer = None
        if state["moments"] is not None:
            self._open_optimizer(self.cursor.task)
            assert self._optimizer is not None
            load_moments(self._optimizer, state["moments"])
