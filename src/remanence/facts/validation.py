"""What is wrong with a set of facts before a model is trained on it, and what to keep in mind where it is not wrong.

    for warning in validate(facts, tokenizer, length=128):
        print(warning)
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from remanence.errors import DataError, nearest
from remanence.facts.borders import Split, split
from remanence.facts.records import Fact, FactSet

_ENOUGH_PREFIXES = 8


def validate(facts: FactSet, tokenizer: Any, length: int | None = None) -> list[str]:
    """Check facts, and how a tokenizer cuts them, before anything is measured.

    Args:
        facts: with the prefixes of their themes.
        tokenizer: any Hugging Face tokenizer.
        length: tokens of the row that a fact is to be written into; None: not checked.

    Returns:
        Warnings, a sentence each, with the number of facts or themes concerned and the first three of them:

        - a keyword occurs earlier in its text, where a model can copy it from; the last occurrence is probed;
        - text between context and keyword is not one blank, while probes put one;
        - a token holds characters of both context and keyword; it is scored with the keyword;
        - words of a context are unknown to the tokenizer;
        - a theme has fewer than 8 priming prefixes, or keywords of different numbers of tokens;
        - the tokenizer is slow: borders are found by common ids.

    Raises:
        DataError: there are no facts; a theme has no priming prefixes; a context is empty and the tokenizer has neither BOS
            nor EOS; a keyword yields no token or an unknown one; a fact is longer than `length`.
    """
    if not len(facts):
        raise DataError("the set has no facts; nothing can be measured.")
    n_priming = _require_prefixes(facts)
    splits = {fact.id: _split(tokenizer, fact) for fact in facts}
    _require_known(facts, tokenizer, splits)
    if length is not None:
        _require_room(facts, tokenizer, length)
    return [
        *_about(facts, _copies, "the keyword occurs earlier in the text, so that a model can copy it; its last occurrence is probed"),
        *_about(facts, _lacks_blank, "context and keyword are not parted by one blank in the text, but are in probes"),
        *_about(
            facts,
            lambda fact: splits[fact.id].is_straddled,
            "a token straddles the border between context and keyword; it is scored as part of the keyword",
        ),
        *_about(
            facts,
            lambda fact: _has_unknown_context(tokenizer, splits[fact.id].prefix_ids),
            "the context has words that the tokenizer does not know",
        ),
        *_few_prefixes(n_priming),
        *_unequal_keywords(facts, splits),
        *_slow(tokenizer),
    ]


# --- errors ----------------------------------------------------------------------------------------------------


def _require_prefixes(facts: FactSet) -> dict[str, int]:
    """Theme -> number of priming prefixes, never 0."""
    n_priming = {fact.theme: len(facts.priming_prefixes(fact)) for fact in _first_of_themes(facts)}
    for theme in (theme for theme, n in n_priming.items() if not n):
        present = {prefix.theme for prefix in facts.prefixes}
        if theme in present:
            raise DataError(
                f"theme '{theme}': all of its prefixes ask for facts of the set, so that none is left to measure priming on; "
                f"add prefixes about other subjects."
            )
        raise DataError(f"theme '{theme}' has no prefixes; add some to the file of prefixes.{nearest(theme, present)}")
    return n_priming


def _first_of_themes(facts: Iterable[Fact]) -> Iterable[Fact]:
    return {fact.theme: fact for fact in facts}.values()


def _split(tokenizer: Any, fact: Fact) -> Split:
    try:
        return split(tokenizer, fact.prompt, fact.keyword)
    except DataError as error:
        raise DataError(f"fact '{fact.id}': {error}") from error


def _require_known(facts: FactSet, tokenizer: Any, splits: dict[str, Split]) -> None:
    unknown = [fact for fact in facts if _is_unknown(tokenizer, splits[fact.id].keyword_ids)]
    if unknown:
        words = ", ".join(f"'{fact.keyword}' ({fact.id})" for fact in unknown[:3])
        raise DataError(
            f"{len(unknown)} of {len(facts)} keywords hold a token unknown to the tokenizer (first three: {words}); "
            f"all such words look alike to the model. Leave these facts out, or choose words of its vocabulary."
        )


def _is_unknown(tokenizer: Any, ids: Sequence[int]) -> bool:
    return tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids


def _has_unknown_context(tokenizer: Any, ids: Sequence[int]) -> bool:
    # GPT-2 names one token as BOS, EOS and unknown; in front of a text it is no unknown word
    return _is_unknown(tokenizer, ids[1:] if ids[0] in (tokenizer.bos_token_id, tokenizer.eos_token_id) else ids)


def _require_room(facts: FactSet, tokenizer: Any, length: int) -> None:
    n_tokens = {fact.id: len(tokenizer.encode(fact.text, add_special_tokens=False)) for fact in facts}
    long = [name for name, n in n_tokens.items() if n > length]
    if long:
        worst = max(long, key=n_tokens.__getitem__)
        raise DataError(
            f"{len(long)} of {len(facts)} facts are longer than a row of {length} tokens (the longest, '{worst}', has {n_tokens[worst]}); "
            f"they are never cut, the keyword would be lost: make the rows longer or the texts shorter."
        )


# --- warnings --------------------------------------------------------------------------------------------------


def _about(facts: FactSet, holds: Callable[[Fact], bool], what: str) -> list[str]:
    found = [fact.id for fact in facts if holds(fact)]
    return [f"{len(found)} of {len(facts)} facts (first three: {', '.join(found[:3])}): {what}."] if found else []


def _copies(fact: Fact) -> bool:
    return re.search(rf"(?<!\w){re.escape(fact.keyword)}(?!\w)", fact.text[: fact.keyword_at], re.IGNORECASE) is not None


def _lacks_blank(fact: Fact) -> bool:
    return bool(fact.prompt) and fact.text[len(fact.prompt) : fact.keyword_at] != " "


def _few_prefixes(n_priming: dict[str, int]) -> list[str]:
    few = {theme: f"{n}" for theme, n in n_priming.items() if n < _ENOUGH_PREFIXES}
    return _themes(
        few, len(n_priming), f"fewer than {_ENOUGH_PREFIXES} priming prefixes, so that a single one of them can decide the median"
    )


def _unequal_keywords(facts: FactSet, splits: dict[str, Split]) -> list[str]:
    sizes: dict[str, set[int]] = defaultdict(set)
    for fact in facts:
        sizes[fact.theme].add(len(splits[fact.id].keyword_ids))
    unequal = {theme: " or ".join(map(str, sorted(found))) for theme, found in sizes.items() if len(found) > 1}
    return _themes(
        unequal,
        len(sizes),
        "keywords of different numbers of tokens; log-probabilities are sums over tokens, so compare a keyword with itself over time, "
        "not with another",
    )


def _themes(found: dict[str, str], n_themes: int, what: str) -> list[str]:
    shown = ", ".join(f"'{theme}' with {n}" for theme, n in list(found.items())[:3])
    return [f"{len(found)} of {n_themes} themes (first three: {shown}) have {what}."] if found else []


def _slow(tokenizer: Any) -> list[str]:
    if getattr(tokenizer, "is_fast", False):
        return []
    return ["the tokenizer is slow and tells no offsets: the border before a keyword is where the ids of the context alone end."]
