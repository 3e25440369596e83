"""Fine-tuning: the lower bound on a stream of tasks, and the upper bound on their union.

Source: the sequential baseline of McCloskey and Cohen 1989 (catastrophic interference); on the joint stream, multi-task
training, Caruana 1997.
"""

from torch import Tensor

from remanence.parts import GradientLearner
from remanence.task import Data, Task


class FineTuning(GradientLearner):
    """All weights follow the current task; nothing protects what came before. Settings: see `GradientLearner`."""

    def _loss(self, task: Task, data: Data, step: int) -> tuple[Tensor, int]:
        batch = self.batch(task, data, step)
        return self._cross_entropy(self.head(self._features(batch.inputs)), batch.targets, task), len(batch.inputs)
