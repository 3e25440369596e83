"""Fisher information of a classifier's parameters.

Axes: N examples, C classes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad, vmap


def diagonal_fisher(
    log_probabilities: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    parameters: Mapping[str, Tensor],
    inputs: Tensor,
    generator: torch.Generator,
    chunk: int = 32,
) -> dict[str, Tensor]:
    """Diagonal of the true Fisher matrix, averaged over examples: F_i = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2.

    Labels are drawn from the model, one per example, not taken from the data (that would be the empirical Fisher).
    Per-example gradients come from one vectorised pass per chunk.

    Args:
        log_probabilities: (parameters, inputs (B, ...)) -> (B, C).
        parameters: name -> tensor; what to differentiate by.
        inputs: (N, ...), N >= 1.
        generator: draws the labels.
        chunk: examples whose gradients are held at once.

    Returns:
        name -> tensor of the parameter's shape, >= 0.

    Source: Kirkpatrick et al. 2017 (PNAS 114(13), eq. 3); on sampled labels, Kunstner et al. 2019 (arXiv 1905.12558).
    """

    def score(values: Mapping[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        return log_probabilities(values, example[None])[0].gather(0, label[None])[0]

    per_example = vmap(grad(score), in_dims=(None, 0, 0))
    detached = {name: value.detach() for name, value in parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in detached.items()}
    for batch in torch.split(inputs, chunk):
        with torch.no_grad():
            probabilities = log_probabilities(detached, batch).exp().cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(batch.device)
        for name, gradient in per_example(detached, batch, labels).items():
            total[name] += gradient.square().sum(0)
    return {name: value / len(inputs) for name, value in total.items()}
