"""The measurements behind the five verbs: learn, keep, disturb, forget, cost."""

from typing import TYPE_CHECKING, Any

from remanence.probes.accuracy import Accuracy
from remanence.probes.calibration import ForecastCheck, Knee, PrimingForecast, calibrate, check_forecast
from remanence.probes.cost import Cost
from remanence.probes.erasure import Membership, Relearning
from remanence.probes.forecast import forecast
from remanence.probes.interference import Bystanders
from remanence.probes.matrix import AccuracyMatrix, accuracy_matrix
from remanence.probes.priming import PrimingProbe, PrimingScores
from remanence.probes.verbs import cell_metrics, five_verbs, paired_difference

if TYPE_CHECKING:
    from remanence.probes.tracing import FactTracer

__all__ = [
    "Accuracy",
    "AccuracyMatrix",
    "Bystanders",
    "Cost",
    "FactTracer",
    "ForecastCheck",
    "Knee",
    "Membership",
    "PrimingForecast",
    "PrimingProbe",
    "PrimingScores",
    "Relearning",
    "accuracy_matrix",
    "calibrate",
    "cell_metrics",
    "check_forecast",
    "five_verbs",
    "forecast",
    "paired_difference",
]


def __getattr__(name: str) -> Any:
    if name == "FactTracer":  # its parent class takes seconds to import
        from remanence.probes.tracing import FactTracer

        return FactTracer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
