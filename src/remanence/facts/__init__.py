"""Single facts: records, worlds to invent them in, schedules on which they are spliced into a running training."""

from remanence.facts.records import Fact, FactSet, Prefix

__all__ = [
    "Fact",
    "FactSet",
    "Prefix",
]
