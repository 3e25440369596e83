"""Knowledge as generated weights: a network reads a handful of examples and writes the weights of a small CNN in one pass."""

from remanence.generated.continual import ContinualHyperTransformer, ContinualState
from remanence.generated.continual_learner import ContinualHyperTransformerLearner
from remanence.generated.episode import UNLABELED, Episode
from remanence.generated.files import load_hypertransformer, model_fingerprint, save_hypertransformer, shipped_hypertransformer
from remanence.generated.hyper_learner import HyperTransformerLearner
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.meta_training import MetaTrainedContinualHyperTransformer, MetaTrainedHyperTransformer
from remanence.generated.sampling import EpisodeSampler, SequenceSampler, require_disjoint
from remanence.generated.target import TargetNet
from remanence.generated.task_weights import TaskWeights

__all__ = [
    "UNLABELED",
    "ContinualHyperTransformer",
    "ContinualHyperTransformerLearner",
    "ContinualState",
    "Episode",
    "EpisodeSampler",
    "HyperTransformer",
    "HyperTransformerLearner",
    "MetaTrainedContinualHyperTransformer",
    "MetaTrainedHyperTransformer",
    "SequenceSampler",
    "TargetNet",
    "TaskWeights",
    "load_hypertransformer",
    "model_fingerprint",
    "require_disjoint",
    "save_hypertransformer",
    "shipped_hypertransformer",
]
