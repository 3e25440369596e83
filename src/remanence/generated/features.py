"""What the weight-writing transformers see of an image: features shared by all layers, and features of one layer's activations.

Axes: N images, C channels, H, W pixels.

Source: Zhmoginov, Sandler and Vladymyrov 2022 (arXiv 2201.04182), section 3.1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SharedFeatures(nn.Module):
    """Four convolutions 3 x 3 with ReLU, stride 2 but for the last, and the mean over space: (N, C, H, W) -> (N, width).

    Computed once an episode and read by the transformer of every layer.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels if index == 0 else width, width, 3, stride=2 if index < 3 else 1, padding=1) for index in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return x.mean((2, 3))


class LocalFeatures(nn.Module):
    """Two convolutions without padding, strides 2 and 1; the spatial means of both outputs, before the ReLU, side by side.

    Kernels are 3 x 3, or as large as the map where that is smaller (stride 1 then), so that the width never depends on the
    side: (N, C, side, side) -> (N, 2 * channels).

    ours: the reference leaves out a convolution whose map is too small, which changes the width silently.
    """

    def __init__(self, in_channels: int, channels: int, side: int, n_convs: int = 2) -> None:
        super().__init__()
        self.width = n_convs * channels
        self.convs = nn.ModuleList()
        for index in range(n_convs):
            kernel = min(3, side)
            stride = 2 if index == 0 and side >= 3 else 1
            self.convs.append(nn.Conv2d(in_channels if index == 0 else channels, channels, kernel, stride))
            side = (side - kernel) // stride + 1

    def forward(self, x: Tensor) -> Tensor:
        means = []
        for index, conv in enumerate(self.convs):
            x = conv(x if index == 0 else F.relu(x))
            means.append(x.mean((2, 3)))
        return torch.cat(means, 1)


class FlatFeatures(nn.Module):
    """The activations themselves: (N, C, side, side) -> (N, C * side * side)."""

    def __init__(self, in_channels: int, side: int) -> None:
        super().__init__()
        self.width = in_channels * side**2

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)
