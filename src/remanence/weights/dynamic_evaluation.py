"""Dynamic evaluation: a language model that takes a step of gradient descent on every window that it has read.

    learner = DynamicEvaluation(model, lr=0.1)
    fit(learner, document)            # a Task of windows in order, see remanence.streams.documents

Source: Krause et al. 2018 (arXiv 1709.07432), section 4, in its plain form: SGD on each window in turn. Their RMS scaling of the rate and
their decay towards the trained weights are left out.
"""

from pathlib import Path

import torch
from torch import nn

from remanence.errors import ErasureNotSupported
from remanence.learner import Steps, require_learnable
from remanence.state import State
from remanence.task import Data, Task
from remanence.weights._language import LanguageLearner


class DynamicEvaluation(LanguageLearner):
    """What a memory holds for a document, the weights hold here: one step of SGD for each of its windows, in order.

    All documents are learned into the same weights, so that a later one disturbs what was learned of an earlier one. `forget` is refused:
    what a window changed stands in every weight, and later windows were learned on top of it.

    Args:
        model: folder of a causal LM, or a module ids (B, T) -> logits (B, T, V), alone or first of a tuple; copied.
        lr: rate of SGD, constant, without momentum or decay. It decides everything: choose it on documents of their own.
        seed: key of the order of rows of a table that is not ordered.
        device: where it runs.

    Raises:
        SettingError: `lr` is not above 0, or the model is quantised.
        DataError: the folder holds no readable model.
    """

    def __init__(self, model: str | Path | nn.Module, lr: float = 0.1, seed: int = 0, device: str | torch.device = "cpu") -> None:
        super().__init__(model, 1, 1, lr, 1.0, "ignore_top", seed, device)
        self.model.requires_grad_(True)

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        """Refused.

        Raises:
            ErasureNotSupported: always.
        """
        require_learnable(self, task)
        raise ErasureNotSupported(
            f"DynamicEvaluation cannot take '{task.name}' out again: later windows were learned on top of it. Begin again without it, or "
            f"read it into a memory that can forget (remanence.context.MelodiReader)."
        )

    def _open(self, task: str) -> None:
        self._open_optimizer()

    def _open_optimizer(self) -> None:
        self._optimizer = torch.optim.SGD(self._trained(), lr=self.lr)

    def _close(self) -> State:
        return {}

    def _end(self, task: str, n_windows: int) -> None:
        self._optimizer = None

    def _take_out(self, window: State) -> None:
        raise NotImplementedError("no window is kept")

    def _trained(self) -> list[nn.Parameter]:
        return list(self._weights().values())
