"""Experience replay: a few old examples in every step.

Source: Chaudhry et al. 2019, On tiny episodic memories (arXiv 1902.10486); reservoir after Vitter 1985.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import SettingError
from remanence.parts import GradientLearner, ReservoirBuffer
from remanence.parts.gradient import Batch
from remanence.state import State
from remanence.task import Data, Task


class Replay(GradientLearner):
    """Fine-tuning in which every step also sees a batch drawn from a reservoir of earlier examples.

    The two batches go through the model in one pass, each weighted by one. A task enters the buffer when it is done.
    `forget` strikes the task's examples from the buffer (exact), then unlearns as `GradientLearner` does while the
    buffer's other examples are kept right (approximate).

    Args:
        budget_bytes: of the buffer, ids and labels included; 200 digits of 8 x 8 are 54,400 bytes.
        replay_size: examples from the buffer per step.
        Others: see `GradientLearner`; `local` is not offered, since the buffer mixes tasks.
    """

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        budget_bytes: int = 54_400,
        replay_size: int = 32,
        epochs: int = 15,
        batch_size: int = 32,
        lr: float = 1e-3,
        forget_epochs: int = 3,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if replay_size < 1:
            raise SettingError(f"Replay: replay_size={replay_size} must be above 0.")
        self.replay_size, self.budget_bytes = replay_size, budget_bytes
        self.buffer = ReservoirBuffer(budget_bytes, seed)
        super().__init__(backbone, epochs, batch_size, lr, forget_epochs, seed=seed, device=device)

    def _reset(self) -> None:
        super()._reset()
        self.buffer = ReservoirBuffer(self.budget_bytes, self.seed)

    def _loss(self, task: Task, data: Data, step: int) -> tuple[Tensor, int]:
        old = self._retained(step)
        if old is None:
            return super()._loss(task, data, step)
        batch = self.batch(task, data, step)
        logits = self.head(self._features(torch.cat([batch.inputs, old.inputs])))
        columns = self.head.columns(torch.cat([batch.targets, old.targets]))
        new, kept = len(batch.inputs), len(old.inputs)
        loss = F.cross_entropy(logits[:new], columns[:new]) + F.cross_entropy(logits[new:], columns[new:])
        return loss, new + kept

    def _retained(self, step: int) -> Batch | None:
        if not len(self.buffer):
            return None
        rows = self.buffer.rows(self.replay_size, self.seed, self.cursor.verb, self.cursor.task, "replay", step)
        return Batch(self.buffer.inputs[rows].to(self.device), self.buffer.targets[rows].to(self.device))

    def _begin_forgetting(self, task: Task) -> None:
        super()._begin_forgetting(task)
        assert task.train is not None
        self.buffer.drop(task.train.ids)

    def _consolidate(self, task: Task, data: Data) -> None:
        self.buffer.offer(data)

    def state_dict(self) -> State:
        return super().state_dict() | {"buffer": self.buffer.state()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.buffer.load(state["buffer"])
