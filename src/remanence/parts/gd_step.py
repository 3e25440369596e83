"""What one step of gradient descent does to a linear classifier: the yardstick for networks that learn in a forward pass.

An attention head that averages the values of its own class writes, up to a factor and a term that all classes share, the weights
of this step; so does a linear self-attention layer. Both claims are tested against the function below.

Axes: S examples, D width, n classes; further axes may lead.
"""

import torch
from torch import Tensor

from remanence.errors import DataError


def gd_step_reference(features: Tensor, labels: Tensor, n: int, lr: float = 1.0) -> Tensor:
    """A linear head after one step of gradient descent from zero, without a bias.

    The loss is cross-entropy summed over the examples. At W = 0 every class has probability 1/n, so row i of the new head is
    lr * sum over m of ([y_m = i] - 1/n) e_m: the *sum* of the class's features, less a vector that all classes share and that a
    softmax does not see. Where shots are unequal a class with more of them gets a longer row, which a mean would not give.

    Args:
        features: (..., S, D) floating point.
        labels: (..., S) int64 in 0..n-1.
        n: classes.
        lr: size of the step; for a loss averaged over the examples divide by S.

    Returns:
        (..., n, D).

    Raises:
        DataError: features and labels disagree in shape, or a label is no class.

    Source: Zhmoginov, Sandler and Vladymyrov 2022 (arXiv 2201.04182), section 3.2; for linear attention von Oswald et al. 2023
        (arXiv 2212.07677).

    Example:
        >>> gd_step_reference(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), n=2, lr=2.0)
        tensor([[ 1., -2.],
                [-1.,  2.]])
    """
    if features.shape[:-1] != labels.shape:
        raise DataError(f"features (..., S, D) are {tuple(features.shape)} and labels (..., S) {tuple(labels.shape)}; give one label each.")
    member = labels[..., None] == torch.arange(n, device=labels.device)
    if not member.any(-1).all():
        raise DataError(f"labels run from {int(labels.min())} to {int(labels.max())}; classes 0..{n - 1} are needed.")
    residual = member.to(features.dtype) - 1 / n
    return lr * residual.transpose(-1, -2) @ features
