"""A backbone with one or all of its memories as a plain module that torch.export and ONNX take.

    reader = TaskReader(memory, "flowers")
    torch.export.export(reader, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    export_onnx(reader, pixels, "flowers.onnx")

Axes: B batch, C classes.
"""

import copy

from torch import Tensor, nn

from remanence.errors import SettingError
from remanence.parts import export_onnx
from remanence.tokens.memory import MemoryViT

__all__ = ["AllTasksReader", "TaskReader", "export_onnx"]


class AllTasksReader(nn.Module):
    """Pixels -> logits of every task, in one pass; a copy that shares nothing with the memory it came from.

    Args:
        memory: with at least one task.
        mean, std: pixel statistics; inputs are (B, C, H, W) in [0, 1].

    Raises:
        SettingError: there is no task.
    """

    def __init__(self, memory: MemoryViT, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        if not memory.tasks:
            raise SettingError("the memory holds no task to read; add one first.")
        self.memory = copy.deepcopy(memory).eval().requires_grad_(False)
        self.mean, self.std = mean, std
        self.eval()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> task name -> (B, C)."""
        return self.memory((pixels - self.mean) / self.std).logits  # type: ignore[no-any-return]


class TaskReader(nn.Module):
    """Pixels -> logits of one task; a copy that shares nothing with the memory it came from.

    Args:
        memory: with the task.
        task: its name.
        mean, std: pixel statistics; inputs are (B, C, H, W) in [0, 1].

    Raises:
        SettingError: there is no such task.
    """

    def __init__(self, memory: MemoryViT, task: str, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        memory.task(task)
        self.all = AllTasksReader(memory, mean, std)
        needed = memory.with_parents([task])
        for other in reversed(memory.tasks):
            if other not in needed:
                self.all.memory.remove_task(other)
        self.task = task
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        scaled = (pixels - self.all.mean) / self.all.std
        return self.all.memory(scaled, [self.task]).logits[self.task]  # type: ignore[no-any-return]
