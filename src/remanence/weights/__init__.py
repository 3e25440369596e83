"""Knowledge in the weights of a model."""

from remanence.weights.dynamic_evaluation import DynamicEvaluation
from remanence.weights.ewc import EWC
from remanence.weights.fine_tuning import FineTuning
from remanence.weights.language import LanguageFineTuning, LanguageLoRA
from remanence.weights.linear_probe import LinearProbe
from remanence.weights.lora import LoRA
from remanence.weights.prototypes import Prototypes
from remanence.weights.replay import Replay

__all__ = [
    "EWC",
    "DynamicEvaluation",
    "FineTuning",
    "LanguageFineTuning",
    "LanguageLoRA",
    "LinearProbe",
    "LoRA",
    "Prototypes",
    "Replay",
]
