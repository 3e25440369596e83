"""What one task owns beside a frozen backbone: memory, class token and head.

Axes: M memory tokens, D width, C classes.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class TaskMemory(nn.Module):
    """What one task owns.

    Args:
        memory: (layers with memory, M, D); zero layers for the modes "class" and "head".
        class_token: (D,), or None for the mode "head", which reads the backbone's own class token.
        classes: source labels of the head's rows.
        layers: which layers have memory.
        parents: tasks whose class token and memory this one may attend to.
        norm: "pre": memory enters before the layer's first norm, as in the paper's Fig. 3; "post": after it, only to read
            memories that were trained so.
    """

    def __init__(
        self,
        memory: Tensor,
        class_token: Tensor | None,
        classes: Sequence[int],
        layers: tuple[int, ...],
        parents: tuple[str, ...] = (),
        norm: Literal["pre", "post"] = "pre",
    ) -> None:
        super().__init__()
        self.memory = nn.Parameter(memory)
        self.class_token = None if class_token is None else nn.Parameter(class_token)
        self.classes, self.layers, self.parents, self.norm = list(classes), layers, parents, norm
        # zeros: the first prediction is uniform, and the first gradient goes to the head alone
        self.head = _zero_head(memory.new_zeros(len(self.classes), memory.shape[-1]))

    @torch.no_grad()
    def grow(self, classes: Iterable[int]) -> None:
        """Add zero rows for the labels that are new; old rows stay as they are.

        The head's tensors are new ones then: hand `trainable_parameters` to a new optimizer.
        """
        new = [label for label in classes if label not in self.classes]
        if new:
            weight, bias = self.head.weight, self.head.bias
            self.head = _zero_head(torch.cat([weight, weight.new_zeros(len(new), weight.shape[1])]))
            self.head.bias.copy_(torch.cat([bias, bias.new_zeros(len(new))]))
            self.classes += new


def _zero_head(weight: Tensor) -> nn.Linear:
    """A linear map with this weight and no bias yet, made without a draw from the global generator."""
    head: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    return head
