"""Visual prompt tuning, the deep form: learnable prompts that take part in every layer's attention.

Axes: B batch, n tokens of the backbone, M prompts, D width.

Source: Jia et al. 2022, Visual Prompt Tuning (arXiv 2203.12119, section 3.2, VPT-Deep).
"""

import torch
from torch import Tensor, nn

from remanence.errors import SettingError
from remanence.keys import generator
from remanence.tokens.view import ViTView


class DeepPrompts(nn.Module):
    """M prompts per layer. They enter after the class token, attend and are attended to, and are replaced at the next layer.

    Unlike memory tokens they change what the patches become, so that the backbone's own answer is another one while they
    are in use, and every task needs a pass of its own.

    Args:
        view: of the frozen backbone.
        tokens: M, at least 1.
        seed, name: key of the draws.
    """

    def __init__(self, view: ViTView, tokens: int, seed: int = 0, name: str = "") -> None:
        super().__init__()
        if tokens < 1:
            raise SettingError(f"tokens={tokens} must be above 0.")
        # uniform in +- sqrt(6 / (3 p^2 + D)) in the paper's code; its width-dependent part alone suffices here
        bound = (6 / (2 * view.width)) ** 0.5
        draws = torch.rand(len(view.layers), tokens, view.width, generator=generator(seed, "prompts", name))
        self.prompts = nn.Parameter((2 * draws - 1) * bound)

    def forward(self, view: ViTView, pixels: Tensor) -> Tensor:
        """(B, D) class token after the final norm, with the prompts in every layer."""
        if not len(pixels):
            return pixels.new_empty(0, view.width)
        size = self.prompts.shape[1]
        handles = [
            layer.module.register_forward_pre_hook(lambda module, args, index=index: self._insert(index, args, size), prepend=True)
            for index, layer in enumerate(view.layers)
        ]
        seen: list[Tensor] = []
        handles.append(view.final_norm.register_forward_hook(lambda module, args, output: seen.append(output)))
        try:
            view.model(pixels)
        finally:
            for handle in handles:
                handle.remove()
        return seen[-1][:, 0]

    def _insert(self, index: int, args: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
        """Put this layer's prompts behind the class token, in place of the last layer's."""
        hidden = args[0]
        rest = hidden[:, 1:] if index == 0 else hidden[:, 1 + size :]
        prompts = self.prompts[index].to(hidden.dtype).expand(len(hidden), -1, -1)
        return (torch.cat([hidden[:, :1], prompts, rest], 1), *args[1:])
