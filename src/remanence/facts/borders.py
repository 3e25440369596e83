"""Where a keyword begins among the tokens of its sentence.

A probe asks for log P(keyword | prefix), and both are characters while the model sees tokens. Tokenising the two apart
and gluing the ids together gives a sequence that the model never met in training: a blank lost here, a merge there.
So prefix and keyword are tokenised as one string, and the border is looked up in it.

    prefix_ids, keyword_ids, is_straddled = split(tokenizer, "the colour of joy is", "vermilion")
"""

from itertools import takewhile
from typing import Any, NamedTuple

from remanence.errors import DataError


class Split(NamedTuple):
    """A sentence's tokens on both sides of the border before its keyword.

    `prefix_ids + keyword_ids` are the tokens of the whole, with whatever the tokenizer puts in front of a text.
    """

    prefix_ids: list[int]
    """Never empty; begins with the tokenizer's own first token (BOS) where it adds one."""
    keyword_ids: list[int]
    """Never empty; the blank before the keyword belongs to it."""
    is_straddled: bool
    """Whether a token holds characters of both sides; it then counts as the keyword's first."""


def split(tokenizer: Any, prefix: str, keyword: str) -> Split:
    """Tokenise `prefix`, one blank and `keyword` as one string and find the border between them.

    A fast tokenizer tells the characters of each token. For a slow one the border is where the ids of the prefix alone
    and of the whole part ways. Tokens that the tokenizer adds behind a text (EOS) are left out.

    Args:
        tokenizer: any Hugging Face tokenizer.
        prefix: the words before; white space at its end is dropped. When nothing is left, BOS stands in its place, else
            EOS, and the keyword is tokenised as it would be at the beginning of a text, without a blank.
        keyword: one or several words; blanks around it are dropped.

    Raises:
        DataError: the keyword is empty or yields no token, or there is no token before it and the tokenizer has neither
            BOS nor EOS.

    Source: ours; scores gone wrong by tokenising the two apart are a known fault of evaluation code.
    """
    prefix, keyword = prefix.rstrip(), keyword.strip()
    if not keyword:
        raise DataError(f"the keyword after {prefix[-60:]!r} is empty; a probe needs at least one word to score.")
    text = f"{prefix} {keyword}" if prefix else keyword
    if getattr(tokenizer, "is_fast", False):
        ids, border, is_straddled = _by_offsets(tokenizer, text, len(prefix))
    else:
        ids, border, is_straddled = _by_common_ids(tokenizer, text, prefix)
    if border == len(ids):
        raise DataError(f"the tokenizer yields no token for the keyword {keyword!r} after {prefix[-60:]!r}; choose a word it knows.")
    return Split(ids[:border] or [_start_id(tokenizer, keyword)], ids[border:], is_straddled)


def _by_offsets(tokenizer: Any, text: str, n_prefix: int) -> tuple[list[int], int, bool]:
    """Ids without those added behind, index of the keyword's first, whether that one begins before the border."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    own = [index for index, sequence in enumerate(encoding.sequence_ids(0)) if sequence is not None]
    if not own:
        return encoding["input_ids"], len(encoding["input_ids"]), False
    ids, offsets = encoding["input_ids"][: own[-1] + 1], encoding["offset_mapping"]
    # some tokenizers count the blank to the token after it, some to none: a token of the prefix ends before the blank
    border = next((index for index in own if offsets[index][1] > n_prefix), len(ids))
    return ids, border, border < len(ids) and offsets[border][0] < n_prefix


def _by_common_ids(tokenizer: Any, text: str, prefix: str) -> tuple[list[int], int, bool]:
    whole, alone = (list(tokenizer.encode(part, add_special_tokens=False)) for part in (text, prefix))
    n_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, alone, strict=False)))
    front = _front(list(tokenizer.encode(text)), whole)
    return front + whole, len(front) + n_common, n_common < len(alone)


def _front(with_special: list[int], without: list[int]) -> list[int]:
    """What a slow tokenizer adds before a text."""
    n_added = len(with_special) - len(without)
    return next((with_special[:n] for n in range(n_added + 1) if with_special[n : n + len(without)] == without), [])


def _start_id(tokenizer: Any, keyword: str) -> int:
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise DataError(
        f"nothing stands before the keyword {keyword!r} and the tokenizer has neither a BOS nor an EOS token to stand in; "
        f"give the keyword a context, or the tokenizer one of the two."
    )
