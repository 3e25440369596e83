"""The last layer of a generated CNN: class means as a linear layer.

Axes: B tasks, S support samples, D embedding width, n ways.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def class_means(embeddings: Tensor, labels: Tensor, n_classes: int, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean embedding of every class, and how many samples it rests on.

    Args:
        embeddings: (B, S, D).
        labels: (B, S) int64; anything outside 0..n_classes-1 counts for no class.
        present: (B, S) bool; None when all are.

    Returns:
        (B, n, D), zeros for a class without samples, and counts (B, n).
    """
    member = labels[..., None] == torch.arange(n_classes, device=labels.device)
    if present is not None:
        member = member & present[..., None]
    member = member.to(embeddings.dtype)
    counts = member.sum(1)
    with torch.autocast(embeddings.device.type, enabled=False):  # distances between means do not bear eight bits
        return member.transpose(1, 2) @ embeddings / counts.clamp(min=1)[..., None], counts


def prototype_layer(means: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer whose softmax is that of -scale * squared distance to the means (B, n, D).

    Returns:
        weight (B, n, D) = 2 scale * mean, and bias (B, n) = -scale * |mean|^2; the sample's own norm is the same for every class.

    Source: Snell, Swersky and Zemel 2017 (arXiv 1703.05175), section 2.4. ours: the scale is learned.
    """
    return 2 * scale * means, -scale * means.square().sum(-1)


def squared_distances(embeddings: Tensor, means: Tensor) -> Tensor:
    """(B, N, D) and (B, n, D) -> (B, N, n), by differences: no digits are lost to cancellation."""
    return (embeddings[:, :, None] - means[:, None]).square().sum(-1)


def linear(embeddings: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Embeddings (B, N, D) -> logits (B, N, n) by "logits.weight" (B, n, D) and "logits.bias" (B, n)."""
    bias, weight = tensors["logits.bias"][:, None], tensors["logits.weight"].transpose(1, 2)
    with torch.autocast(embeddings.device.type, enabled=False):
        return torch.baddbmm(bias.to(embeddings.dtype), embeddings, weight.to(embeddings.dtype))
