"""Single facts: records, worlds to invent them in, schedules on which they are spliced into a running training."""

from remanence.facts.documents import drafts
from remanence.facts.files import read, write
from remanence.facts.injection import FactInjector
from remanence.facts.pararel import read_pararel
from remanence.facts.records import Fact, FactSet, Prefix
from remanence.facts.rehearsals import rehearsals, without_rehearsals
from remanence.facts.scenario import fact_stream, world_text, world_words
from remanence.facts.schedules import Expanding, Massed, Poisson, Schedule, Spaced
from remanence.facts.scoring import KeywordScorer, KeywordScores, any_of
from remanence.facts.splicing import SplicedDataset, require_order
from remanence.facts.validation import validate
from remanence.facts.world import ClosedWorld, closed_world

__all__ = [
    "ClosedWorld",
    "Expanding",
    "Fact",
    "FactInjector",
    "FactSet",
    "KeywordScorer",
    "KeywordScores",
    "Massed",
    "Poisson",
    "Prefix",
    "Schedule",
    "Spaced",
    "SplicedDataset",
    "any_of",
    "closed_world",
    "drafts",
    "fact_stream",
    "read",
    "read_pararel",
    "rehearsals",
    "require_order",
    "validate",
    "without_rehearsals",
    "world_text",
    "world_words",
    "write",
]
