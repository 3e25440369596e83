"""A linear read-out on frozen features, trained by gradient steps.

Source: linear probes, Alain and Bengio 2016 (arXiv 1610.01644).
"""

import torch
from torch import Tensor

from remanence.parts import GradientLearner


class LinearProbe(GradientLearner):
    """Only the head learns; the features stay as they were, so that bystanders cannot move. Settings: see `GradientLearner`.

    `forget` is approximate: the dropped rows are gone, but the other rows were trained in their presence.
    """

    trains_backbone = False

    def _features(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return super()._features(inputs)
