"""Fine-tuning: the lower bound on a stream of tasks, and the upper bound on their union.

Source: the sequential baseline of McCloskey and Cohen 1989 (catastrophic interference); on the joint stream, multi-task
training, Caruana 1997.
"""

from remanence.parts import GradientLearner


class FineTuning(GradientLearner):
    """All weights follow the current task; nothing protects what came before. Settings: see `GradientLearner`."""
