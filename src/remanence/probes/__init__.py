"""The measurements behind the five verbs: learn, keep, disturb, forget, cost."""

from remanence.probes.accuracy import Accuracy
from remanence.probes.cost import Cost
from remanence.probes.erasure import Membership, Relearning
from remanence.probes.interference import Bystanders
from remanence.probes.matrix import AccuracyMatrix, accuracy_matrix
from remanence.probes.priming import PrimingProbe, PrimingScores
from remanence.probes.verbs import cell_metrics, five_verbs, paired_difference

__all__ = [
    "Accuracy",
    "AccuracyMatrix",
    "Bystanders",
    "Cost",
    "Membership",
    "PrimingProbe",
    "PrimingScores",
    "Relearning",
    "accuracy_matrix",
    "cell_metrics",
    "five_verbs",
    "paired_difference",
]
