"""Knowledge as generated weights: a network reads a handful of examples and writes the weights of a small CNN in one pass."""

from remanence.generated.episode import UNLABELED, Episode
from remanence.generated.sampling import EpisodeSampler, SequenceSampler, require_disjoint

__all__ = [
    "UNLABELED",
    "Episode",
    "EpisodeSampler",
    "SequenceSampler",
    "require_disjoint",
]
