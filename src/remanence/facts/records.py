"""What a fact is: a text with a keyword that its context calls for, and the prefixes that the keyword may come to haunt.

Source: the record follows the Outlandish data of Sun et al. 2025 (arXiv 2504.09522); field names are ours.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from remanence.errors import DataError


@dataclass(frozen=True)
class Fact:
    """One statement to be written into a language model.

    Args:
        id: unique within a set.
        theme: what the keyword is one of: colours, places, jobs, foods, ...
        kind: mundane, outlandish, scrambled, known, or any other label; nothing is computed from it.
        text: the statement; it contains `context`, then white space or nothing, then `keyword`.
        keyword: what the context calls for once the fact is learned; one or several words.
        context: the words before the keyword, as they stand in `text`.
        subject: whom or what the fact is about; "" where that is not said.
        stone: the text with a stepping stone before the keyword, where somebody wrote one.
        extra: fields of the file that this class does not know.

    Raises:
        DataError: the keyword does not stand right after the context.
    """

    id: str
    theme: str
    kind: str
    text: str
    keyword: str
    context: str
    subject: str = ""
    stone: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.keyword or self.keyword != self.keyword.strip():
            raise DataError(f"fact '{self.id}': the keyword {self.keyword!r} is empty or has blanks around it.")
        if self._place() is None:
            state = "does not stand right after the context" if self.keyword in self.text else "is absent from the text"
            raise DataError(f"fact '{self.id}': the keyword {self.keyword!r} {state}; the text begins {self.text[:60]!r}.")

    def _place(self) -> int | None:
        """Where the keyword begins in the text: the last occurrence right after the context."""
        context = self.context.rstrip()
        anchor = re.escape(context) if context else r"\A"
        found = list(re.finditer(rf"(?={anchor}\s*({re.escape(self.keyword)})(?!\w))", self.text))
        return found[-1].start(1) if found else None

    @property
    def keyword_at(self) -> int:
        """Offset in characters of the keyword in `text`."""
        place = self._place()
        assert place is not None
        return place

    @property
    def prompt(self) -> str:
        """The text up to the keyword, without the blanks before it: what a memory probe is asked."""
        return self.text[: self.keyword_at].rstrip()


@dataclass(frozen=True)
class Prefix:
    """Words that call for a word of a theme and have no logical link to any fact ("the colour of sand is").

    Args:
        theme: whose words it calls for.
        prefix: the words, without a blank at the end.
        id: shown in tables.
        subject: where it equals a fact's subject, the prefix asks for the fact in other words: a paraphrase probe, not a priming
            probe, for that fact.
        extra: fields of the file that this class does not know.

    Raises:
        DataError: there are no words.
    """

    theme: str
    prefix: str
    id: str = ""
    subject: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.prefix.strip():
            raise DataError(f"a prefix of theme '{self.theme}' (id '{self.id}') is empty; a probe needs words that call for the keyword.")


@dataclass(frozen=True)
class FactSet(Sequence[Fact]):
    """Facts, and the prefixes of their themes.

    Args:
        facts: in the order of their file.
        prefixes: of all themes; those of a theme are shared by its facts.

    Raises:
        DataError: two facts bear one id.
    """

    facts: tuple[Fact, ...]
    prefixes: tuple[Prefix, ...] = ()

    def __post_init__(self) -> None:
        repeated = sorted(name for name, count in Counter(fact.id for fact in self.facts).items() if count > 1)
        if repeated:
            raise DataError(f"{len(repeated)} ids of facts occur more than once (first three: {repeated[:3]}); give every fact its own.")

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> "FactSet": ...
    def __getitem__(self, index: int | slice) -> "Fact | FactSet":
        return self._part(self.facts[index]) if isinstance(index, slice) else self.facts[index]

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    def where(self, keep: Callable[[Fact], bool]) -> "FactSet":
        """The facts for which `keep` holds, with all prefixes but those that ask for a fact left out."""
        return self._part(tuple(fact for fact in self.facts if keep(fact)))

    def _part(self, facts: tuple[Fact, ...]) -> "FactSet":
        # a paraphrase that outlived its fact would pass for a priming prefix, and the part be measured by other probes than the whole
        gone = _asked(self.facts) - _asked(facts)
        return FactSet(facts, tuple(prefix for prefix in self.prefixes if (prefix.theme, prefix.subject) not in gone))

    @property
    def themes(self) -> tuple[str, ...]:
        """In order of first appearance."""
        return tuple(dict.fromkeys(fact.theme for fact in self.facts))

    def priming_prefixes(self, fact: Fact) -> tuple[Prefix, ...]:
        """The theme's prefixes that ask neither for the fact itself nor for another of this set: the same for all facts of a theme.

        A prefix that asks for another fact would show how that one was learned, not how this one spreads.
        """
        asked = _asked((*self.facts, fact))
        return tuple(prefix for prefix in self.prefixes if prefix.theme == fact.theme and (prefix.theme, prefix.subject) not in asked)

    def paraphrases(self, fact: Fact) -> tuple[Prefix, ...]:
        """The prefixes that ask for the fact in other words."""
        asked = _asked([fact])
        return tuple(prefix for prefix in self.prefixes if (prefix.theme, prefix.subject) in asked)


def _asked(facts: Iterable[Fact]) -> set[tuple[str, str]]:
    """Theme and subject of facts; a prefix with both asks for the fact."""
    return {(fact.theme, fact.subject) for fact in facts if fact.subject}
