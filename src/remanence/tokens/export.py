"""A backbone with one or all of its memories as a plain module that torch.export and ONNX take.

Axes: B batch, C classes.
"""

import copy

import torch
from torch import Tensor, nn

from remanence.tokens.memory import MemoryViT


class TaskReader(nn.Module):
    """Pixels -> logits of one task; a copy that shares nothing with the memory it came from.

    Args:
        memory: with the task.
        task: its name.
        mean, std: pixel statistics; inputs are (B, C, H, W) in [0, 1].
    """

    def __init__(self, memory: MemoryViT, task: str, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        memory.task(task)
        self.memory = copy.deepcopy(memory).eval().requires_grad_(False)
        for other in [name for name in self.memory.tasks if name != task and name not in memory.task(task).parents]:
            self.memory.remove_task(other, cascade=True)
        self.task, self.mean, self.std = task, mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        logits: Tensor = self.memory((pixels - self.mean) / self.std, [self.task]).logits[self.task]
        return logits


def export_onnx(reader: nn.Module, example: Tensor, path: str) -> None:
    """Write a module as ONNX with a free batch axis; needs the extra `onnx`."""
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(reader, (example,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
