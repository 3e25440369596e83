"""What the learners on a language model share: text in, next-token answers out, a window of weights for every task.

Axes: B batch; N windows of text; T tokens; V vocabulary.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.erasure import sparse_mask
from remanence.erasure._selection import Selection
from remanence.errors import ErasureNotSupported, SettingError
from remanence.learner import Cursor, Footprint, Learner, Prediction, Steps, require_learnable
from remanence.parts.gradient import run_verb
from remanence.parts.language_model import is_quantised, load_language_model, logits_of, require_token_windows, row_scores, token_loss
from remanence.parts.optimizer_state import load_moments, moments
from remanence.state import State, copy_state, state_bytes
from remanence.task import Data, Task


class LanguageLearner(Learner, ABC):
    """A causal language model that goes on training, and keeps of each task what taking it out again needs.

    A task's train set are next-token windows, inputs and targets (N, T); negative targets are not counted. Ordered tables are
    read in order. The model stays in evaluation mode: nothing drops out, nothing draws from the global generators.

    `forget` is a sparse update: of what the task's window of training changed, the selected entries go back. It is approximate
    by design. A window goes out whole: a part of a task cannot be forgotten, and nothing can be forgotten twice.

    Args:
        model: folder of a causal LM, or a module ids (B, T) -> logits (B, T, V); copied.
        epochs: passes over a task's train set.
        batch_size: windows per step, and rows per forward pass when reading.
        lr: rate of AdamW, constant; weight decay is 0.01.
        select, fraction: which entries of a window's change stay at `forget`; see `remanence.erasure.sparse_mask`.
        seed: key of all random choices.
        device: where it runs; the windows of the tasks are kept in main memory.

    Raises:
        SettingError: a number is not above 0, `fraction` or `select` is out of range, the model is quantised.
        DataError: the folder holds no readable model.
    """

    store = "weights"
    answers = ("tokens",)

    def __init__(
        self, model: str | Path | nn.Module, epochs: int, batch_size: int, lr: float, fraction: float, select: Selection, seed: int,
        device: str | torch.device,
    ) -> None:  # fmt: skip
        for name, value in (("epochs", epochs), ("batch_size", batch_size), ("lr", lr)):
            if value <= 0:
                raise SettingError(f"{type(self).__name__}: {name}={value} must be above 0.")
        sparse_mask(torch.zeros(1), select, fraction)  # refuses settings that are out of range
        self.select, self.fraction = select, fraction
        self.epochs, self.batch_size, self.lr, self.seed = epochs, batch_size, lr, seed
        self.device = torch.device(device)
        self.model: Any = (copy.deepcopy(model) if isinstance(model, nn.Module) else load_language_model(model)).eval().to(self.device)
        if is_quantised(self.model):
            raise SettingError(f"{type(self).__name__}: the model's weights are quantised; load it without quantisation to train it.")
        self.cursor = Cursor()
        self._windows: dict[str, list[State]] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    # --- hooks -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _open(self, task: str) -> None:
        """Before a task's first step: note where the weights stand, make the optimizer ready. Runs twice at times."""

    @abstractmethod
    def _close(self) -> State:
        """After a task's last step: the tensors of its window."""

    @abstractmethod
    def _take_out(self, window: State) -> None:
        """Return the selected part of a window's change."""

    @abstractmethod
    def _trained(self) -> list[nn.Parameter]:
        """What a step trains."""

    # --- verbs -------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> Steps:
        data = require_learnable(self, task)
        self._require_fit(data, task.name)
        n_steps = data.steps(self.epochs, self.batch_size)
        return run_verb(
            self.cursor,
            ("learn", task.name, n_steps),
            lambda: self._open(task.name),
            lambda step: self._step(task, data, step),
            lambda: self._end(task.name, len(data)),
        )

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        """Take the selected part of a task's change out again; one pass over the weights, hence no steps.

        Args:
            task: as it was learned.
            retain: not read.

        Raises:
            ErasureNotSupported: no window of this task is kept, or only a part of it is to go.
        """
        data = require_learnable(self, task)
        return run_verb(
            self.cursor,
            ("forget", task.name, 0),
            lambda: self._require_window(task.name, len(data)),
            lambda step: (None, 0),
            lambda: self._discard(task.name),
        )

    def _require_fit(self, data: Data, name: str) -> None:
        require_token_windows(data, name, getattr(getattr(self.model, "config", None), "vocab_size", None))

    def _step(self, task: Task, data: Data, step: int) -> tuple[Tensor, int]:
        optimizer = self._optimizer
        assert optimizer is not None
        rows = data.rows(step, self.batch_size, self.seed, "learn", task.name)
        with torch.enable_grad():
            loss = token_loss(self.model, data.inputs[rows].to(self.device), data.targets[rows].to(self.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # a copy of the model shall not carry gradients
        return loss.detach(), len(rows)

    def _end(self, task: str, n_windows: int) -> None:
        window = self._close()
        if n_windows:
            self._windows.setdefault(task, []).append({"n": n_windows, **window})

    def _require_window(self, task: str, n_windows: int) -> None:
        kept = self._windows.get(task)
        if not kept:
            raise ErasureNotSupported(
                f"{type(self).__name__} keeps no window of '{task}': it was never learned here, or is forgotten already. "
                f"Kept: {', '.join(self._windows) or 'none'}. Forget one of those, or use a gradient method (remanence.erasure)."
            )
        sizes = sorted({int(window["n"]) for window in kept})
        if n_windows not in sizes:
            raise ErasureNotSupported(
                f"{type(self).__name__} learned {sizes} windows of text as '{task}' and is asked to forget {n_windows}; what one run of "
                f"training changed goes out whole. Forget the whole task, or learn in smaller tasks."
            )

    def _discard(self, task: str) -> None:
        for window in reversed(self._windows.pop(task)):
            self._take_out(window)

    def _open_optimizer(self) -> None:
        self._optimizer = torch.optim.AdamW(self._trained(), lr=self.lr, weight_decay=0.01, fused=True)

    # --- reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        """Answer ids (B, T) with logits (B, T, V) for the tokens that follow; columns are the ids 0 .. V - 1.

        The result is dense: give few rows at a time, or ask for `score`.
        """
        if len(inputs) == 0:
            logits = self._logits(inputs.new_zeros(1, *inputs.shape[1:]))[:0]
        else:
            logits = torch.cat([self._logits(part) for part in torch.split(inputs, self.batch_size)])
        return Prediction(logits, torch.arange(logits.shape[-1], device=logits.device))

    @torch.no_grad()
    def score(self, inputs: Tensor, targets: Tensor, task: str | None = None, reader: str = "") -> Tensor:
        """(B,) log-probability in float32 of each row's targets that are 0 or above, summed; logits exist for one batch at a time."""
        sums = [row_scores(self._logits(rows), wanted) for rows, wanted in self._parts(inputs, targets)]
        return torch.cat(sums) if sums else torch.zeros(0, device=self.device)

    def _parts(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if len(inputs):
            yield from zip(torch.split(inputs, self.batch_size), torch.split(targets.to(self.device), self.batch_size), strict=True)

    def _logits(self, inputs: Tensor) -> Tensor:
        return logits_of(self.model, inputs.to(self.device))

    def footprint(self) -> Footprint:
        """`task_bytes` are the bytes of each task's windows; weights and moments are shared."""
        sizes = {task: state_bytes(windows) for task, windows in self._windows.items()}
        n_trained = sum(parameter.numel() for parameter in self._trained())
        return Footprint(state_bytes(self.state_dict()) - sum(sizes.values()), sizes, n_trained)

    def export(self, task: str | None = None) -> nn.Module:
        """The language model itself, a copy without gradients: `save_pretrained` writes it where it came from `transformers`."""
        model: nn.Module = copy.deepcopy(self.model)
        return model.eval().requires_grad_(False)

    # --- state -------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, nn.Parameter]:
        """Parameters by name, tied ones once."""
        return dict(self.model.named_parameters())

    def state_dict(self) -> State:
        return {
            "cursor": self.cursor.state_dict(),
            "weights": {name: parameter.detach() for name, parameter in self._weights().items()},
            "moments": moments(self._optimizer) if self._optimizer is not None else None,
            "windows": {task: list(windows) for task, windows in self._windows.items()},
        }

    def load_state_dict(self, state: State) -> None:
        self.cursor.load_state_dict(state["cursor"])
        with torch.no_grad():
            for name, parameter in self._weights().items():
                parameter.copy_(state["weights"][name])
        self._windows = copy_state(state["windows"])
        self._optimizer = None
        if state["moments"] is not None:
            self._open_optimizer()
            assert self._optimizer is not None
            load_moments(self._optimizer, state["moments"])
