"""Where running text says what a fact says: a fact that the stream goes on rehearsing is not being retained.

    n = rehearsals(facts, source.train)          # fact id -> how often its context is followed by its keyword
    texts = without_rehearsals(source.train, facts)
"""

import re
from collections.abc import Iterable, Sequence

from remanence.errors import DataError
from remanence.facts.records import Fact

__all__ = ["rehearsals", "without_rehearsals"]


def rehearsals(facts: Sequence[Fact], texts: Iterable[str]) -> dict[str, int]:
    """How often texts rehearse each fact: its context, then its keyword.

    Letters must agree in case; any white space counts as a blank, so that a line break does not hide a rehearsal. A fact
    without a context is rehearsed by a text that begins with its keyword.

    Args:
        facts: the ones that are injected.
        texts: the documents of the continuing stream; read once.

    Returns:
        fact id -> occurrences in all texts, in the order of `facts`.

    Raises:
        DataError: `texts` is a single str.

    Example:
        >>> fact = Fact("a", "colours", "known", "sand is yellow.", "yellow", "sand is")
        >>> rehearsals([fact], ["Dry sand is\\nyellow, wet sand is brown.", "sand is yellowish"])
        {'a': 1}
    """
    patterns = {fact.id: _pattern(fact) for fact in facts}
    counts = dict.fromkeys(patterns, 0)
    for text in _documents(texts):
        for name, pattern in patterns.items():
            counts[name] += sum(1 for _ in pattern.finditer(text))
    return counts


def without_rehearsals(texts: Iterable[str], facts: Sequence[Fact]) -> tuple[str, ...]:
    """The texts that rehearse none of the facts, in their order.

    A text goes as a whole; cut long documents into paragraphs first.

    Raises:
        DataError: `texts` is a single str.
    """
    patterns = [_pattern(fact) for fact in facts]
    return tuple(text for text in _documents(texts) if not any(pattern.search(text) for pattern in patterns))


def _pattern(fact: Fact) -> re.Pattern[str]:
    context = r"\s+".join(map(re.escape, fact.context.split()))
    keyword = r"\s+".join(map(re.escape, fact.keyword.split()))
    if not context:
        return re.compile(rf"\A\s*{keyword}(?!\w)")
    edge = r"\b" if re.match(r"\w", fact.context.lstrip()) else ""
    # as in the fact's own text: "he" and "at" must not be found in "heat", but "$" and "5" stand in "$5"
    blank = r"\s+" if fact.text[fact.keyword_at - 1].isspace() else ""
    return re.compile(rf"{edge}{context}{blank}{keyword}(?!\w)")


def _documents(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):
        raise DataError("texts is one str; give a list of documents.")
    return texts
