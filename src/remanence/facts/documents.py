"""Drafts of facts from plain documents: sentences that end on a word worth probing, for a person to edit.

    write(drafts(texts, tokenizer), "drafts.jsonl")

A draft has the sentence, its last word as keyword and the words before as context. Theme and kind are a person's to say:
the theme is "?" and the kind "draft" until then, and no prefixes come along.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from remanence.errors import DataError, SettingError
from remanence.facts.borders import split
from remanence.facts.records import Fact, FactSet

_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+(?=["'(\[]*[A-Z])|\n\s*\n""")
_LAST_WORD = re.compile(r"(?P<context>.*\S)\s+(?P<keyword>[^\W\d_]+(?:[-'’][^\W\d_]+)*)[.!?…\"')\]]*", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_MIN_CONTEXT_WORDS = 3
"""Fewer words call for nothing in particular."""


def drafts(
    texts: Sequence[str],
    tokenizer: Any,
    n_rare: int = 2,
    max_share: float = 1e-3,
    max_tokens: int = 2,
    frequencies: Mapping[str, int] | None = None,
) -> FactSet:
    """Every sentence of the documents whose last word could be a keyword.

    Such a word has letters only (hyphens and apostrophes inside), is known to the tokenizer, does not occur earlier in the
    sentence, follows three words or more, and is no English stop word (by scikit-learn's list, which has "fire" and
    "system" on it, too).

    Args:
        texts: documents; white space inside a sentence becomes one blank.
        tokenizer: any Hugging Face tokenizer.
        n_rare: words counted less often are too rare.
        max_share: words that make up more than this share of all words, in (0, 1], are too frequent; the default leaves out
            the hundred or so most frequent words of English. Words counted `n_rare` times stay, however few the words are.
        max_tokens: most tokens of a keyword.
        frequencies: lower-case word -> count, as of a large corpus; None: counted in `texts`.

    Returns:
        Facts with id "document.sentence", both from 0; theme "?", kind "draft"; `extra` has the keyword's count and number
        of tokens. Empty where no sentence qualifies.

    Raises:
        SettingError: a number is out of range.
        DataError: there are no words to count.

    Source: ours.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.WordLevel({"?": 0, "The": 1, "sea": 2, "is": 3, "deep": 4, "blue": 5, ".": 6}, "?"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
        >>> found = drafts(["Look. The sea is deep blue."], tokenizer, n_rare=1, max_share=1.0)
        >>> [(fact.id, fact.context, fact.keyword) for fact in found]
        [('0.1', 'The sea is deep', 'blue')]
    """
    if n_rare < 0 or max_tokens < 1 or not 0 < max_share <= 1:
        raise SettingError(
            f"drafts: n_rare={n_rare} must be 0 or more, max_tokens={max_tokens} 1 or more, max_share={max_share} above 0 and at most 1."
        )
    counts = Counter(word.lower() for text in texts for word in _WORD.findall(text)) if frequencies is None else frequencies
    n_words = sum(counts.values())
    if not n_words:
        raise DataError(f"drafts: there are no words to count in {len(texts)} documents; give texts, or frequencies, with words.")
    allowed = _keywords(counts, n_rare, max(max_share * n_words, n_rare))
    made = (
        _draft(f"{document}.{number}", sentence, tokenizer, max_tokens, allowed)
        for document, text in enumerate(texts)
        for number, sentence in enumerate(_sentences(text))
    )
    return FactSet(tuple(fact for fact in made if fact is not None))


def _keywords(counts: Mapping[str, int], n_rare: int, n_most: float) -> dict[str, int]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # scikit-learn takes a second to import

    return {word: count for word, count in counts.items() if n_rare <= count <= n_most and word not in ENGLISH_STOP_WORDS}


def _sentences(text: str) -> Iterator[str]:
    return (" ".join(sentence.split()) for sentence in _SENTENCE_END.split(text) if sentence.strip())


def _draft(name: str, sentence: str, tokenizer: Any, max_tokens: int, allowed: Mapping[str, int]) -> Fact | None:
    found = _LAST_WORD.fullmatch(sentence)
    if not found or found["keyword"].lower() not in allowed:
        return None
    context, keyword = found["context"], found["keyword"]
    words = [word.lower() for word in _WORD.findall(context)]
    if len(words) < _MIN_CONTEXT_WORDS or keyword.lower() in words:
        return None
    try:
        ids = split(tokenizer, context, keyword).keyword_ids
    except DataError:  # the tokenizer knows no letter of it
        return None
    if len(ids) > max_tokens or tokenizer.unk_token_id in ids:
        return None
    extra = {"count": allowed[keyword.lower()], "n_tokens": len(ids)}
    return Fact(name, "?", "draft", sentence, keyword, context, extra=extra)
