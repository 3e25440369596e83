"""The small CNN whose weights another network writes: a description that holds no tensors of its own.

    target = TargetNet(channels=8)
    logits = target.functional(x, tensors)              # every task with weights of its own, in one call

The four-block CNN of few-shot learning: convolution 3 x 3 without bias, ReLU, max-pooling by 2, normalisation, in this order;
then the last map, flattened, and a linear layer. Tensors of B tasks lie in one dict with a leading task axis; the names are
`conv1.weight`, `conv1.gamma`, `conv1.beta`, with recorded statistics `conv1.mean` and `conv1.var`, ..., `logits.weight`, `logits.bias`.

Inside, activations of B tasks lie as (N, B*C, H, W): B grouped convolutions are then one call, and a view as (N*B, C, H, W) is
what a network that all tasks share reads. No task is ever a turn of a Python loop.

Axes: B tasks, N images of a task, C channels, K kernel side, H, W pixels, D embedding width, n ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.generated.heads import linear

Norm = Literal["batch", "group"]
Statistics = tuple[Tensor, Tensor]
EPS = 1e-3
"""Of every normalisation: with one image a class on a 1 x 1 map a variance rests on n numbers, and 1e-5 explodes."""
KERNEL = 3


@dataclass(frozen=True)
class TargetNet:
    """The shape of a generated CNN.

    Args:
        channels: of every block.
        in_channels: of the images.
        image_size: side of the square images, in pixels.
        n_layers: blocks; each halves the side, rounding down.
        norm: "batch" normalises a task's channels over its images, which makes answers depend on each other unless
            statistics are recorded; "group" normalises every image by itself.

    Raises:
        SettingError: a number is below 1, the norm is unknown, the images are too small for so many blocks, or a norm over single
            images has one number to normalise.

    Source: Vinyals et al. 2016 (arXiv 1606.04080), four blocks; the order of ReLU, pooling and normalisation is that of
        Zhmoginov, Sandler and Vladymyrov 2022 (arXiv 2201.04182).

    Example:
        >>> target = TargetNet(channels=8)
        >>> target.sides, target.embedding_width, target.kernel_shape("conv2")
        ((28, 14, 7, 3, 1), 8, (8, 8, 3, 3))
    """

    channels: int = 8
    in_channels: int = 1
    image_size: int = 28
    n_layers: int = 4
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        for name in ("channels", "in_channels", "image_size", "n_layers"):
            if getattr(self, name) < 1:
                raise SettingError(f"TargetNet: {name}={getattr(self, name)} must be 1 or more.")
        if self.norm not in ("batch", "group"):
            raise SettingError(f"TargetNet: norm='{self.norm}' is unknown; give 'batch' or 'group'.")
        if self.image_size >> self.n_layers == 0:
            raise SettingError(
                f"TargetNet: images of side {self.image_size} vanish after {self.n_layers} halvings; "
                f"give at most {self.image_size.bit_length() - 1} layers."
            )
        if self.norm == "group" and self.embedding_width == 1:
            raise SettingError("TargetNet: norm='group' turns one channel on a 1 x 1 map into a constant; give 2 channels or more.")

    @property
    def conv_names(self) -> tuple[str, ...]:
        return tuple(f"conv{index}" for index in range(1, self.n_layers + 1))

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the map before every block, and after the last."""
        return tuple(self.image_size >> index for index in range(self.n_layers + 1))

    @property
    def embedding_width(self) -> int:
        """D: numbers in the flattened last map."""
        return self.channels * self.sides[-1] ** 2

    def in_width(self, name: str) -> int:
        """Input channels of a block."""
        return self.in_channels if name == "conv1" else self.channels

    def kernel_shape(self, name: str) -> tuple[int, int, int, int]:
        """(out, in, K, K) of a block."""
        return (self.channels, self.in_width(name), KERNEL, KERNEL)

    def require_fit(self, images: Tensor) -> None:
        """Refuse images (B, N, C, H, W) that this net cannot take.

        Raises:
            DataError: another number of axes, channels or pixels.
        """
        wanted = (self.in_channels, self.image_size, self.image_size)
        if images.dim() != 5 or tuple(images.shape[2:]) != wanted:
            raise DataError(
                f"images must be (tasks, images, {', '.join(map(str, wanted))}), got {tuple(images.shape)}. Nothing is resized here: bring "
                f"them to {self.image_size} x {self.image_size} pixels and {self.in_channels} channels first."
            )

    # --- blocks ------------------------------------------------------------------------------------------------

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolution, max-pooling and ReLU (which commute) of B tasks: (N, B*C, H, W), (B, out, in, K, K) -> (N, B*out, h, w).

        Kernels (out, in, K, K) without a task axis are shared by all tasks.
        """
        if kernels.dim() == 5:
            y = F.conv2d(x, kernels.flatten(0, 1), padding=KERNEL // 2, groups=len(kernels))
        else:
            n, c = x.shape[0], kernels.shape[1]
            y = F.conv2d(x.reshape(-1, c, *x.shape[2:]), kernels, padding=KERNEL // 2).reshape(n, -1, *x.shape[2:])
        return F.max_pool2d(y, 2).relu()

    def normalise(self, x: Tensor, gamma: Tensor, beta: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Normalise (N, B*C, H, W) with gamma and beta (B, C); in float32 where x is narrower.

        Args:
            statistics: mean and variance (B, C) to use with "batch"; by default those of x itself.

        Raises:
            DataError: a channel has one number to take its own statistics from.
        """
        x = _at_least_float32(x)
        if self.norm == "group":
            return F.group_norm(x, len(gamma), gamma.flatten(), beta.flatten(), EPS)
        if statistics is None:
            if x.shape[0] * x.shape[2] * x.shape[3] == 1:
                raise DataError(
                    "bn_stats='query' and a single image on a 1 x 1 map: its own statistics turn every image into the same answer. "
                    "Use bn_stats='support', or ask about several images at once."
                )
            return F.batch_norm(x, None, None, gamma.flatten(), beta.flatten(), training=True, eps=EPS)
        mean, variance = statistics
        scale = gamma * (variance + EPS).rsqrt()
        shift = beta - mean * scale
        return x * scale.flatten()[:, None, None] + shift.flatten()[:, None, None]

    def statistics(self, x: Tensor, n_tasks: int, present: Tensor | None = None) -> Statistics:
        """Mean and (biased) variance (B, C) over a task's images and pixels.

        Args:
            x: (N, B*C, H, W).
            present: (B, N) bool; images that are absent count nothing.
        """
        x = _at_least_float32(x).unflatten(1, (n_tasks, -1))  # type: ignore[no-untyped-call]
        if present is None:
            variance, mean = torch.var_mean(x, dim=(0, 3, 4), correction=0)
            return mean, variance
        weight = present.T[:, :, None, None, None].to(x.dtype)
        total = weight.sum(0)[..., 0, 0] * x.shape[3] * x.shape[4]
        mean = (x * weight).sum((0, 3, 4)) / total
        variance = ((x - mean[:, :, None, None]).square() * weight).sum((0, 3, 4)) / total
        return mean, variance

    # --- whole network -----------------------------------------------------------------------------------------

    def embed(self, x: Tensor, tensors: Mapping[str, Tensor], bn_stats: Literal["query", "support"] = "query") -> Tensor:
        """Images (B, N, C, H, W) -> embeddings (B, N, D).

        Args:
            tensors: as in the module's docstring.
            bn_stats: of a "batch" norm. "query": statistics of x itself, so that answers depend on each other (transductive);
                "support": those recorded in `tensors`.

        Raises:
            DataError: another number of channels, pixels or tasks, another dtype, or as `normalise`.
        """
        self.require_fit(x)
        self._require_partner(x, tensors)
        z = grouped(x)
        for name in self.conv_names:
            z = self.convolve(z, tensors[f"{name}.weight"])
            recorded = (tensors[f"{name}.mean"], tensors[f"{name}.var"]) if bn_stats == "support" and self.norm == "batch" else None
            z = self.normalise(z, tensors[f"{name}.gamma"], tensors[f"{name}.beta"], recorded)
        return flat(z, len(x))

    def functional(self, x: Tensor, tensors: Mapping[str, Tensor], bn_stats: Literal["query", "support"] = "query") -> Tensor:
        """Images (B, N, C, H, W) -> logits (B, N, n), every task with its own weights; see `embed`."""
        return linear(self.embed(x, tensors, bn_stats), tensors)

    def _require_partner(self, x: Tensor, tensors: Mapping[str, Tensor]) -> None:
        n_tasks, kernels = len(tensors["conv1.gamma"]), tensors["conv1.weight"]
        if len(x) != n_tasks:
            raise DataError(f"images of {len(x)} tasks and weights of {n_tasks}; expand the images where all tasks see the same.")
        if x.dtype != kernels.dtype and not torch.is_autocast_enabled(x.device.type):
            raise DataError(f"images are {x.dtype}, weights {kernels.dtype}; convert the images with x.to({kernels.dtype}).")


def grouped(x: Tensor) -> Tensor:
    """(B, N, C, H, W) -> (N, B*C, H, W), the layout in which B tasks are groups of one convolution."""
    return x.transpose(0, 1).flatten(1, 2)


def flat(x: Tensor, n_tasks: int) -> Tensor:
    """(N, B*C, H, W) -> (B, N, C*H*W)."""
    return x.unflatten(1, (n_tasks, -1)).flatten(2).transpose(0, 1)  # type: ignore[no-any-return, no-untyped-call]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
