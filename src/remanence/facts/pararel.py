"""Facts of the real world, each said in several ways: ParaRel.

    facts = read_pararel("data/pararel", ["P19", "P36"], n_facts=40, counterfactual=True)

A folder holds `patterns.jsonl` (fields relation, pattern: "[X] was born in [Y].") and `triples.jsonl` (relation, subject,
object), each also .gz. One pattern of a relation is injected with the fact's subject; the others with the same subject
ask for it in other words; all of them with other subjects are the priming prefixes of the relation.

Source: Elazar et al. 2021 (arXiv 2102.01017); the triples go back to LAMA (Petroni et al. 2019, arXiv 1909.01066) and T-REx.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path

from remanence.errors import DataError, SettingError, nearest
from remanence.facts._tables import lines_of
from remanence.facts.records import Fact, FactSet, Prefix
from remanence.keys import key_seed

_USABLE = re.compile(r"(?P<before>[^\[\]]*\[X\][^\[\]]* )\[Y\](?P<after>\W*)")
"""Subject, then a blank, then the object, then nothing but punctuation."""


@dataclass
class _Relation:
    """What a folder says about one relation."""

    name: str
    patterns: list[re.Match[str]] = field(default_factory=list)
    n_left_out: int = 0
    objects: dict[str, list[str]] = field(default_factory=dict)
    """Subject -> all objects that are true of it, in the order of the file."""

    def mixed(self, seed: int) -> list[str]:
        """All subjects in an order of their own for each seed, the same whatever else is asked for."""
        return sorted(self.objects, key=lambda subject: key_seed("pararel", seed, self.name, subject))


def read_pararel(
    folder: str | Path,
    relations: Sequence[str] | None = None,
    n_facts: int = 100,
    seed: int = 0,
    counterfactual: bool = False,
    n_prefixes: int = 40,
) -> FactSet:
    """Draw facts from a folder of ParaRel, relations in turn; a relation is a theme.

    Patterns in which the object does not stand last cannot be probed and are left out; `extra["n_patterns_left_out"]` of
    each fact counts those of its relation. Left out are, too, triples whose object occurs in the question ("Windows
    Phone is owned by Windows": copying, not memory), and of the triples about one subject all but the first.

    Args:
        folder: where `patterns.jsonl` and `triples.jsonl` lie, each also .gz.
        relations: their names; None: all that have at least two usable patterns, so that each fact has a paraphrase.
        n_facts: how many in all. More of them begin with the same ones.
        seed: which subjects, patterns and wrong objects.
        counterfactual: put another object of the relation in the true one's place, never one that is true of the subject
            as well; such facts are of kind "outlandish", true ones "known".
        n_prefixes: priming prefixes of a relation, about subjects that no fact of the set is about.

    Returns:
        Facts with `subject`, and with the pattern and the true object in `extra`; the relations' priming prefixes, and each
        fact's paraphrases, as many as its relation has other patterns.

    Raises:
        DataError: a file is absent or broken, a relation has no usable pattern, or there are fewer facts or prefixes.
        SettingError: a relation is unknown, or a count is out of range.

    Source: patterns and triples of Elazar et al. 2021. ours: which of them serve as what.
    """
    if n_facts < 1 or n_prefixes < 1:
        raise SettingError(f"read_pararel: n_facts={n_facts} and n_prefixes={n_prefixes} must be 1 or more.")
    known = _relations(Path(folder))
    wanted = _wanted(known, relations)
    facts = tuple(islice(_in_turn([_facts(known[name], seed, counterfactual) for name in wanted]), n_facts))
    if len(facts) < n_facts:
        raise DataError(f"{len(wanted)} relations of {folder} give {len(facts)} facts, not {n_facts}; ask for fewer, or more relations.")
    themes = tuple(dict.fromkeys(fact.theme for fact in facts))
    prefixes = [prefix for theme in themes for prefix in _prefixes(known[theme], facts, seed, n_prefixes)]
    return FactSet(facts, tuple(prefixes))


# --- the files -------------------------------------------------------------------------------------------------


def _relations(folder: Path) -> dict[str, _Relation]:
    found: dict[str, _Relation] = {}
    for name, pattern in dict.fromkeys(_rows(folder, "patterns", ("relation", "pattern"))):
        relation = found.setdefault(name, _Relation(name))
        usable = _USABLE.fullmatch(pattern.strip())
        if not usable:
            relation.n_left_out += 1
        elif usable["before"] not in [other["before"] for other in relation.patterns]:  # the same question but for a full stop
            relation.patterns.append(usable)
    for name, subject, object_ in dict.fromkeys(_rows(folder, "triples", ("relation", "subject", "object"))):
        found.setdefault(name, _Relation(name)).objects.setdefault(subject, []).append(object_)
    return found


def _rows(folder: Path, stem: str, wanted: Sequence[str]) -> Iterator[tuple[str, ...]]:
    plain, packed = folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"
    path = packed if packed.exists() and not plain.exists() else plain
    for line in lines_of(path):
        values = tuple(line.record.get(name) for name in wanted)
        if line.fault or not all(isinstance(value, str) and value.strip() for value in values):
            fault = line.fault or f"each of {', '.join(wanted)} must hold text; the record begins {str(line.record)[:60]!r}"
            raise DataError(f"{path}, line {line.number}: {fault}.")
        yield tuple(str(value).strip() for value in values)


def _wanted(known: dict[str, _Relation], names: Sequence[str] | None) -> list[str]:
    if names is None:
        names = sorted(name for name, relation in known.items() if len(relation.patterns) > 1 and relation.objects)
    for name in names:
        if name not in known:
            raise SettingError(f"read_pararel: there is no relation '{name}'.{nearest(name, known)}")
        relation = known[name]
        if not relation.patterns:
            raise DataError(
                f"relation '{name}': in none of its {relation.n_left_out} patterns the object stands last, after the subject and a "
                f"blank; leave the relation out."
            )
    return list(dict.fromkeys(names))


# --- facts and prefixes ----------------------------------------------------------------------------------------


def _facts(relation: _Relation, seed: int, is_counterfactual: bool) -> Iterator[Fact]:
    made = (_fact(relation, subject, seed, is_counterfactual) for subject in relation.mixed(seed))
    return (fact for fact in made if fact is not None)


def _fact(relation: _Relation, subject: str, seed: int, is_counterfactual: bool) -> Fact | None:
    draw = key_seed("pararel fact", seed, relation.name, subject)
    pattern = relation.patterns[draw % len(relation.patterns)]
    context = _ask(pattern, subject)
    true = relation.objects[subject]
    choice = _others(relation, true) if is_counterfactual else true[:1]
    choice = [object_ for object_ in choice if object_.lower() not in context.lower()]
    if not choice:
        return None
    keyword = choice[draw // len(relation.patterns) % len(choice)]
    return Fact(
        id=f"{relation.name} {subject}",
        theme=relation.name,
        kind="outlandish" if is_counterfactual else "known",
        text=f"{context} {keyword}{pattern['after']}",
        keyword=keyword,
        context=context,
        subject=subject,
        extra={"pattern": pattern.string, "true_object": true[0], "n_patterns_left_out": relation.n_left_out},
    )


def _others(relation: _Relation, true: Sequence[str]) -> list[str]:
    return sorted({object_ for objects in relation.objects.values() for object_ in objects} - set(true))


def _ask(pattern: re.Match[str], subject: str) -> str:
    return pattern["before"].replace("[X]", subject).rstrip()


def _in_turn(relations: Sequence[Iterator[Fact]]) -> Iterator[Fact]:
    for row in zip_longest(*relations):
        yield from (fact for fact in row if fact is not None)


def _prefixes(relation: _Relation, facts: Sequence[Fact], seed: int, n_priming: int) -> list[Prefix]:
    ours = [fact for fact in facts if fact.theme == relation.name]
    asked = {fact.subject for fact in ours}
    others = [subject for subject in relation.mixed(seed) if subject not in asked]
    n = len(relation.patterns)
    # a round over the subjects before any of them is asked about a second time, by another pattern
    pairs = ((relation.patterns[(index + turn) % n], subject) for turn in range(n) for index, subject in enumerate(others))
    priming = [
        Prefix(relation.name, _ask(pattern, subject), f"{relation.name} {number}", subject)
        for number, (pattern, subject) in enumerate(islice(pairs, n_priming))
    ]
    if len(priming) < n_priming:
        raise DataError(
            f"relation '{relation.name}': {len(others)} subjects without a fact and {n} patterns give {len(priming)} priming prefixes, "
            f"not {n_priming}; ask for fewer of them, or for fewer facts."
        )
    rest = [
        Prefix(relation.name, _ask(pattern, fact.subject), f"{fact.id} {number}", fact.subject)
        for fact in ours
        for number, pattern in enumerate(relation.patterns)
        if pattern.string != fact.extra["pattern"]
    ]
    return [*priming, *rest]
