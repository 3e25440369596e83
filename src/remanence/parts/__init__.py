"""What several stores need and none owns."""

from remanence.parts.buffer import ReservoirBuffer
from remanence.parts.export import export_onnx
from remanence.parts.fisher import diagonal_fisher
from remanence.parts.gradient import GradientLearner, run_verb
from remanence.parts.heads import ClassHead, PrototypeHead
from remanence.parts.hosts import VisionHost
from remanence.parts.language_model import held_out_loss, load_language_model, load_tokenizer, token_loss
from remanence.parts.language_pretraining import PretrainedLM
from remanence.parts.per_task import PerTaskLearner
from remanence.parts.pretraining import PretrainedViT
from remanence.parts.task_book import TaskBook

__all__ = [
    "ClassHead",
    "GradientLearner",
    "PerTaskLearner",
    "PretrainedLM",
    "PretrainedViT",
    "PrototypeHead",
    "ReservoirBuffer",
    "TaskBook",
    "VisionHost",
    "diagonal_fisher",
    "export_onnx",
    "held_out_loss",
    "load_language_model",
    "load_tokenizer",
    "run_verb",
    "token_loss",
]
