"""The frozen backbone's part of training, computed once.

Axes: N images, n tokens of the backbone, L layers, D width, H heads, d = D / H.
"""

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.tokens.memory import MemoryViT
from remanence.tokens.view import Capture


class FeatureCache:
    """Keys, values and final class tokens of fixed images, from which `MemoryViT.read` trains without the backbone.

    Valid for these very pixels only: no random augmentation. ours: keys and values instead of layer inputs, twice the
    memory, but a step then costs nothing that grows with n D^2.

    Args:
        memory: whose backbone is cached.
        pixels: (N, C, height, width), normalised as the backbone expects.
        dtype: what the cache is kept in; None for the backbone's own.
        max_bytes: refuse to begin above this.
        batch_size: images per pass.

    Raises:
        SettingError: the cache would exceed `max_bytes`; both numbers are named.
        DataError: there is no image.

    Source: section 5 of Sandler et al. 2022 counts the cost; the cache is ours.
    """

    def __init__(
        self, memory: MemoryViT, pixels: Tensor, dtype: torch.dtype | None = None, max_bytes: float = 2e9, batch_size: int = 256
    ) -> None:
        if not len(pixels):
            raise DataError("no image to cache; give at least one.")
        self.dtype = dtype or next(memory.model.parameters()).dtype
        self.n_bytes = self.bytes_per_image(memory, self.dtype) * len(pixels)
        if self.n_bytes > max_bytes:
            raise SettingError(
                f"the cache of {len(pixels)} images needs {self.n_bytes:.3g} bytes, max_bytes is {max_bytes:.3g}. "
                f"Cache fewer images, use dtype=torch.float16, or raise max_bytes."
            )
        captures = [memory.view.capture(batch) for batch in torch.split(pixels, batch_size)]
        n_layers = len(memory.view.layers)
        self.keys = [torch.cat([capture.keys[layer] for capture in captures]).to(self.dtype) for layer in range(n_layers)]
        self.values = [torch.cat([capture.values[layer] for capture in captures]).to(self.dtype) for layer in range(n_layers)]
        self.last = torch.cat([capture.last for capture in captures]).to(self.dtype)
        self._compute_dtype = next(memory.model.parameters()).dtype
        self._model = memory.model

    @staticmethod
    def bytes_per_image(memory: MemoryViT, dtype: torch.dtype = torch.float32) -> int:
        """2 L n D + D numbers."""
        view = memory.view
        return (2 * len(view.layers) * view.n_tokens + 1) * view.width * dtype.itemsize

    def __len__(self) -> int:
        return len(self.last)

    def __getitem__(self, rows: Tensor) -> Capture:
        """The captured pass of these images."""
        dtype = self._compute_dtype
        keys = [table[rows].to(dtype) for table in self.keys]
        return Capture(None, keys, [table[rows].to(dtype) for table in self.values], self.last[rows].to(dtype), self._model)
