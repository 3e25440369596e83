"""Rows of numbers as small grey pictures: what stands between a table of features and a CNN.

Axes: N rows, F features, H, W pixels as given, s side of the pictures.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import DataError, SettingError

Floats = npt.NDArray[np.float64]
SMALLEST_IMAGE = 8
"""Side from which on a square number of features is taken for an image: 4, 9 or 16 features are more often a table."""


def flatten_images(samples: Any) -> tuple[Any, tuple[int, int] | None]:
    """Images as rows of pixels; a table is left as it is.

    Args:
        samples: (N, F), (N, H, W) or (N, 1, H, W): an array, a tensor, or nested lists.

    Returns:
        (N, F), and (H, W) where images were given.

    Raises:
        DataError: images in colour.

    Example:
        >>> rows, shape = flatten_images(np.zeros((5, 1, 3, 4)))
        >>> rows.shape, shape
        ((5, 12), (3, 4))
    """
    samples = np.asarray(samples) if isinstance(samples, list | tuple) else samples
    shape = tuple(getattr(samples, "shape", ()))
    if len(shape) not in (3, 4):
        return samples, None
    if len(shape) == 4 and shape[1] != 1:
        raise DataError(f"images of shape {shape}: grey ones are needed, (N, H, W) or (N, 1, H, W); average the channels of colour first.")
    return np.asarray(samples).reshape(len(samples), -1), (int(shape[-2]), int(shape[-1]))


def find_shape(n_features: int, image_shape: Any) -> tuple[int, int] | None:
    """(H, W) of the images that rows of features are; None for a table.

    Args:
        n_features: F.
        image_shape: (H, W), or None: a square of side 8 or more where F is one, else a table.

    Raises:
        SettingError: `image_shape` is no pair of positive numbers, or does not make F pixels.

    Example:
        >>> find_shape(64, None), find_shape(13, None), find_shape(12, (3, 4))
        ((8, 8), None, (3, 4))
    """
    if image_shape is None:
        side = math.isqrt(n_features)
        return (side, side) if side**2 == n_features and side >= SMALLEST_IMAGE else None
    pair = tuple(image_shape) if isinstance(image_shape, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(number, int | np.integer) and number >= 1 for number in pair):
        raise SettingError(f"image_shape={image_shape!r} must be (height, width) in pixels, or None.")
    if pair[0] * pair[1] != n_features:
        raise SettingError(
            f"image_shape={image_shape!r} makes {pair[0] * pair[1]} pixels, but X has {n_features} features; give the shape that X has."
        )
    return int(pair[0]), int(pair[1])


@dataclass(frozen=True)
class Pictures:
    """How rows become pictures: range, polarity and layout, all learnt from the training rows.

    An image keeps its aspect and stands in the middle of a black square, which is resized (bilinear, with antialias where it shrinks).
    A table's row is a grid of cells, one for each feature, read like a page: above, the feature as a grey level; below, its complement.
    The complement keeps what a normalisation over the picture would remove: how bright it is as a whole.

    Args:
        shape: (H, W) of images; None for a table.
        side: s.
        low, span: smallest number of the training rows, and half their range: (1,) for images, (F,) for a table.
        is_inverted: the training images are dark on light; they are turned into light on dark.
    """

    shape: tuple[int, int] | None
    side: int
    low: Floats
    span: Floats
    is_inverted: bool

    @classmethod
    def fit(cls, rows: Floats, shape: tuple[int, int] | None, side: int) -> "Pictures":
        """Range and polarity of training rows (N, F)."""
        axis = 0 if shape is None else None
        low, high = (np.atleast_1d(bound) for bound in (rows.min(axis), rows.max(axis)))
        span = np.where(high > low, high / 2 - low / 2, 0.5)  # half of it: the whole may overflow
        unturned = cls(shape, side, low, span, False)
        return replace(unturned, is_inverted=shape is not None and float(np.median(unturned._levels(rows))) > 0.5)

    def draw(self, rows: Floats) -> Tensor:
        """Rows (N, F) -> pictures (N, 1, s, s) float64 in [0, 1]; what lies outside the training rows' range is cut off."""
        levels = torch.from_numpy(self._levels(rows))
        if self.shape is None:
            return self._grid(levels)
        images = 1 - levels if self.is_inverted else levels
        (height, width), longer = self.shape, max(self.shape)
        above, left = (longer - height) // 2, (longer - width) // 2
        images = F.pad(images.reshape(-1, 1, height, width), (left, longer - width - left, above, longer - height - above))
        return self._resized(images)

    def _levels(self, rows: Floats) -> Floats:
        return np.clip((rows / 2 - self.low / 2) / self.span, 0, 1)

    def _grid(self, levels: Tensor) -> Tensor:
        n_features = levels.shape[1]
        columns = math.ceil(math.sqrt(n_features))
        rows = math.ceil(n_features / columns)
        cells = F.pad(levels, (0, rows * columns - n_features)).reshape(-1, rows, columns)
        if 2 * rows > self.side:  # no room for complements: averaged with their features they would turn everything grey
            return self._resized(cells[:, None])
        pairs = torch.stack([cells, 1 - cells], 2).flatten(1, 2)[:, None]
        return F.interpolate(pairs, (self.side, self.side), mode="nearest-exact")

    def _resized(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == (self.side, self.side):
            return images
        return F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
