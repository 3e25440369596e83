"""What the transformers of all layers read of a support set.

Axes: B tasks, S support samples, e code width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Support:
    """Read once an episode, by every layer.

    Args:
        labels: (B, S) int64 rows of the code table, the last one for "no label".
        shared: (B, S, width) features of the images.
        mask: (B, S) bool, True = present; None when all are.
        codes: (B, n, e) codes of these tasks' classes; None where they are learned.
        n_ways: slots of the last layer.
    """

    labels: Tensor
    shared: Tensor
    mask: Tensor | None
    codes: Tensor | None
    n_ways: int


def random_codes(n_tasks: int, n_codes: int, width: int, draw: torch.Generator | None) -> Tensor:
    """(B, n, e) orthogonal codes of length sqrt(e), as long as learned ones.

    Args:
        draw: what they are drawn from, another set a task; None gives every task the same, at every call.

    Source: Haar-distributed by the signs of R: those that the factorisation chose would tell slots apart (Mezzadri 2007,
        arXiv math-ph/0609050).
    """
    drawn = torch.randn(1 if draw is None else n_tasks, width, width, generator=draw or torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(drawn)
    codes: Tensor = math.sqrt(width) * (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None])[:, :n_codes]
    return codes.expand(n_tasks, -1, -1)
