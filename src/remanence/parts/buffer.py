"""A replay buffer that is bounded in bytes.

Axes: N examples held.
"""

import torch
from torch import Tensor

from remanence.errors import SettingError
from remanence.keys import Key, generator
from remanence.state import State
from remanence.task import Data


class ReservoirBuffer:
    """A uniform sample of all examples offered so far, within a byte budget.

    Every offered example stands in the buffer with equal probability, whatever the number of tasks, without knowing it
    in advance. The draws are keyed by (seed, how many were offered), so that nothing random is stored.

    Args:
        budget_bytes: for inputs, targets and ids together.
        seed: key of the draws.

    Source: algorithm R, Vitter 1985 (ACM TOMS 11(1)); as replay memory, Chaudhry et al. 2019 (arXiv 1902.10486).
    """

    def __init__(self, budget_bytes: int, seed: int) -> None:
        if budget_bytes < 1:
            raise SettingError(f"budget_bytes={budget_bytes} holds no example; give at least the bytes of one.")
        self.budget_bytes, self.seed = budget_bytes, seed
        self.n_offered = 0
        self.inputs, self.targets, self.ids = torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def capacity(self, data: Data) -> int:
        """How many examples like these fit into the budget."""
        if not len(data):
            return 0
        return self.budget_bytes // sum(table[0].numel() * table.element_size() for table in (data.inputs, data.targets, data.ids))

    def offer(self, data: Data) -> None:
        """Show every example of a table once.

        Raises:
            SettingError: the budget is too small for a single example.
        """
        if not len(data):
            return
        capacity = self.capacity(data)
        if capacity == 0:
            shape = tuple(data.inputs.shape[1:])
            raise SettingError(f"budget_bytes={self.budget_bytes} is below the size of one example of shape {shape}.")
        # slot[i]: where example i goes; position n_offered + i is kept with probability capacity / (position + 1)
        positions = torch.arange(self.n_offered, self.n_offered + len(data))
        draws = torch.rand(len(data), generator=generator(self.seed, "reservoir", self.n_offered), dtype=torch.float64)
        slots = torch.where(positions < capacity, positions, (draws * (positions + 1)).long())
        self._place(data, slots, capacity)
        self.n_offered += len(data)

    def _place(self, data: Data, slots: Tensor, capacity: int) -> None:
        # the buffer may have shrunk by `forget`: then free places are filled first
        size = len(self)
        source = {slot: ("old", slot) for slot in range(size)}
        for example, slot in enumerate(slots.tolist()):
            if len(source) < capacity:
                source[len(source)] = ("new", example)
            elif slot < capacity:
                source[slot] = ("new", example)
        old = torch.tensor([slot for slot, (kind, _) in source.items() if kind == "old"], dtype=torch.int64)
        new = torch.tensor([index for kind, index in source.values() if kind == "new"], dtype=torch.int64)
        if size == 0:
            self.inputs = data.inputs[:0]
        self.inputs = torch.cat([self.inputs[old], data.inputs[new]])
        self.targets = torch.cat([self.targets[old], data.targets[new]])
        self.ids = torch.cat([self.ids[old], data.ids[new]])

    def rows(self, size: int, *key: Key) -> Tensor:
        """(min(size, N),) row numbers without repetition, drawn from the key."""
        return torch.randperm(len(self), generator=generator(*key))[:size]

    def drop(self, ids: Tensor) -> int:
        """Remove examples by id; returns how many stood in the buffer."""
        kept = ~torch.isin(self.ids, ids)
        self.inputs, self.targets, self.ids = self.inputs[kept], self.targets[kept], self.ids[kept]
        return int((~kept).sum())

    def state(self) -> State:
        return {"n_offered": self.n_offered, "inputs": self.inputs, "targets": self.targets, "ids": self.ids}

    def load(self, state: State) -> None:
        """Become what `state()` described; copies."""
        self.n_offered = state["n_offered"]
        self.inputs, self.targets, self.ids = (state[name].cpu().clone() for name in ("inputs", "targets", "ids"))
