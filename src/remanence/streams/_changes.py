"""Changes of all images of a source that keep their labels: turns and permutations of pixels."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.keys import generator


class Change(Protocol):
    """A pure function of images (N, C, H, W), with a name and the variant number that its copies carry in their ids."""

    @property
    def name(self) -> str: ...
    @property
    def variant(self) -> int: ...
    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Turn:
    """Anticlockwise by whole degrees, 0..359: exact at right angles, else bilinear with 0 outside the image."""

    degrees: int
    variant: int

    @property
    def name(self) -> str:
        return f"turned {self.degrees}°"

    def __call__(self, images: Tensor) -> Tensor:
        if self.degrees % 90 == 0:
            return images.rot90(self.degrees // 90, (2, 3))
        angle = math.radians(self.degrees)
        height, width = images.shape[2:]
        # where each output pixel comes from, in units of half a side each: hence the ratios
        matrix = [
            [math.cos(angle), -math.sin(angle) * height / width, 0.0],
            [math.sin(angle) * width / height, math.cos(angle), 0.0],
        ]
        grid = F.affine_grid(torch.tensor([matrix]).expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)


@dataclass(frozen=True)
class Permutation:
    """Pixels in an order drawn from (order_seed, variant); channels move together; variant 0 changes nothing."""

    variant: int
    order_seed: int

    @property
    def name(self) -> str:
        return f"permutation {self.variant}"

    def __call__(self, images: Tensor) -> Tensor:
        if self.variant == 0:
            return images
        pixels = images.flatten(2)
        order = torch.randperm(pixels.shape[2], generator=generator("permutation", self.order_seed, self.variant))
        return pixels[:, :, order].view_as(images)
