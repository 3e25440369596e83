"""Facts as rows of tokens, and rows that hold a fact which should go.

Rows are next-token tables: `targets[n, t]` is what follows `inputs[n, t]`; rows are padded on the right, and what is not
to be counted is -100. A causal model never looks to the right, so padding needs no mask.

Axes: N facts or rows; T tokens.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import DataError
from remanence.facts.borders import split
from remanence.facts.records import Fact
from remanence.parts.language_model import IGNORED
from remanence.task import Data


def keyword_rows(facts: Sequence[Fact], tokenizer: Any) -> Data:
    """One row a fact: the words up to and with the keyword; only the keyword's tokens are targets.

    Returns:
        inputs and targets (N, T) int64, in the order of the facts.

    Raises:
        DataError: there are no facts, or a keyword yields no token.
    """
    cuts = [split(tokenizer, fact.prompt, fact.keyword) for fact in facts]
    return _table([([*cut.prefix_ids, *cut.keyword_ids], len(cut.prefix_ids)) for cut in cuts])


def text_rows(facts: Sequence[Fact], tokenizer: Any) -> Data:
    """One row a fact: its whole text, every token but the first a target.

    Raises:
        DataError: there are no facts, or a text is a single token.
    """
    rows = [list(tokenizer(fact.text)["input_ids"]) for fact in facts]
    for fact, ids in zip(facts, rows, strict=True):
        if len(ids) < 2:
            raise DataError(f"fact '{fact.id}': its text {fact.text[:60]!r} is {len(ids)} tokens; two are needed to predict anything.")
    return _table([(ids, 1) for ids in rows])


def _table(rows: list[tuple[list[int], int]]) -> Data:
    """Rows of (ids, index of the first target)."""
    if not rows:
        raise DataError("there are no facts; give at least one.")
    width = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for row, (ids, first) in enumerate(rows):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
    return Data(inputs, targets, torch.arange(len(rows)))


def require_room(model: nn.Module, data: Data, what: str) -> None:
    """Refuse rows that are longer than the model reads.

    Raises:
        DataError: a row is longer than the model's `max_position_embeddings`.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and data.inputs.shape[1] > limit:
        raise DataError(f"{what} take {data.inputs.shape[1]} tokens, the model reads {limit}; shorten them or cut shorter windows.")


def overlap(facts: Sequence[Fact], retain: Data | Sequence[Fact], tokenizer: Any) -> list[tuple[int, str]]:
    """Which retained rows state a fact that should go: those that hold its context and keyword, or its text.

    Both sides are compared as the model sees them, after tokenising: two words that the vocabulary does not know are one.
    A fact that is torn apart by the border of two windows is not found.

    Returns:
        (row, id of the fact), ascending.
    """
    texts = _decoded_rows(retain, tokenizer) if isinstance(retain, Data) else (_seen(fact.text, tokenizer) for fact in retain)
    needles = [(fact.id, _seen(_statement(fact), tokenizer)) for fact in facts]
    patterns = [(name, needle, re.compile(rf"(?<!\w){re.escape(needle)}(?!\w)")) for name, needle in needles]
    return [
        (row, name) for row, text in enumerate(texts) for name, needle, pattern in patterns if needle in text and pattern.search(text)
    ]


def _statement(fact: Fact) -> str:
    """Context and keyword as they stand in the text; without a context the whole text, for the keyword alone stands in many a row."""
    context, end = fact.context.strip(), fact.keyword_at + len(fact.keyword)
    return fact.text[fact.text.rindex(context, 0, fact.keyword_at) : end] if context else fact.text


def _seen(text: str, tokenizer: Any) -> str:
    return _one_line(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _decoded_rows(data: Data, tokenizer: Any) -> Iterable[str]:
    for inputs, targets in zip(data.inputs, data.targets, strict=True):
        yield _one_line(tokenizer.decode(_whole_row(inputs, targets).tolist()))


def _whole_row(inputs: Tensor, targets: Tensor) -> Tensor:
    counted = (targets >= 0).nonzero().flatten()
    return inputs if len(counted) == 0 else torch.cat([inputs[: int(counted[-1]) + 1], targets[counted[-1:]]])


def _one_line(text: str) -> str:
    return " ".join(text.split())
