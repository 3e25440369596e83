"""A fact's tokens, written over the beginning of a row.

Axes: T tokens of a row; n tokens of a fact.
"""

import copy
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from remanence.errors import DataError
from remanence.facts.records import Fact

Batch = TypeVar("Batch", bound=Tensor | MutableMapping[str, Any])

ROW_ENTRIES = ("input_ids", "labels", "attention_mask")

IGNORED = -100
"""The target that `torch.nn.functional.cross_entropy` leaves out."""


@dataclass(frozen=True, eq=False)
class FactRow:
    """The tokens of a fact, as they would stand in packed text.

    Args:
        name: the fact's id, for messages.
        tokens: (n,) int64 of the text alone, without special tokens.
        end: EOS, which closes a document in packed text; None where the tokenizer has none.
        padding: what fills the rest of the row; None: the row's own tokens stay.
    """

    name: str
    tokens: Tensor
    end: int | None
    padding: int | None

    def fitting(self, length: int) -> Tensor:
        """The tokens for a row of `length`: with EOS behind them where there is room for it.

        Raises:
            DataError: the row is shorter than the fact.
        """
        n = len(self.tokens)
        if n > length:
            raise DataError(
                f"fact '{self.name}' has {n} tokens, its row {length}; give rows of {n} or more, or a shorter text. "
                f"(It is never cut: the keyword would be lost.)"
            )
        if self.end is None or n == length:
            return self.tokens
        return torch.cat([self.tokens, torch.tensor([self.end])])

    def write(self, ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Overwrite a row in place: ids, labels (not shifted) and attention mask, (T,) each."""
        tokens = self.fitting(len(ids)).to(ids.device)
        n = len(tokens)
        ids[:n] = tokens
        if labels is not None:
            labels[:n] = tokens.to(labels.device)
        if mask is not None:
            mask[:n] = 1
        if self.padding is None:
            return
        ids[n:] = self.padding
        if labels is not None:
            labels[n:] = IGNORED
        if mask is not None:
            mask[n:] = 0

    def write_shifted(self, inputs: Tensor, targets: Tensor) -> None:
        """Overwrite a next-token window in place: inputs and targets, (T,) each, targets[t] following inputs[t].

        Such a window holds T + 1 tokens, so that the fact may be one token longer than the inputs.
        """
        tokens = self.fitting(len(inputs) + 1)
        n = len(tokens)
        inputs[:n] = tokens[: len(inputs)]
        targets[: n - 1] = tokens[1:]
        if self.padding is not None:
            inputs[n:] = self.padding
            targets[n - 1 :] = IGNORED


def fact_row(fact: Fact, tokenizer: Any, is_padded: bool) -> FactRow:
    """Tokenise a fact the way running text is tokenised.

    Raises:
        DataError: the tokenizer yields no tokens.
    """
    tokens = tokenizer(fact.text, add_special_tokens=False)["input_ids"]
    if len(tokens) == 0:
        raise DataError(f"fact '{fact.id}': the tokenizer yields no tokens for {fact.text[:60]!r}; it knows none of these words.")
    end = tokenizer.eos_token_id
    padding = next((id_ for id_ in (tokenizer.pad_token_id, end) if id_ is not None), 0)
    return FactRow(fact.id, torch.tensor(tokens, dtype=torch.int64), end, padding if is_padded else None)


def overwrite(batch: Batch, places: Sequence[tuple[FactRow, int | EllipsisType]]) -> Batch:
    """A copy of a batch with facts written into rows; the batch given is left as it is.

    Args:
        batch: ids (B, T), or a mapping with `input_ids` and, where there are some, `labels` and `attention_mask` of the
            same shape. (T,) for a single item.
        places: facts and their rows; `...` is the item itself.

    Raises:
        DataError: `input_ids` is absent, an entry has another shape, or a fact is longer than its row.
    """
    if isinstance(batch, Tensor):
        ids = batch.clone()
        for fact, index in places:
            fact.write(ids[index])
        return cast(Batch, ids)
    changed = copy.copy(batch)
    for name, value in _row_entries(batch).items():
        changed[name] = value.clone()
    labels, mask = changed.get("labels"), changed.get("attention_mask")
    for fact, index in places:
        fact.write(changed["input_ids"][index], None if labels is None else labels[index], None if mask is None else mask[index])
    return changed


def token_ids(batch: Tensor | MutableMapping[str, Any]) -> Tensor:
    """The ids of a batch or item.

    Raises:
        DataError: `input_ids` is absent.
    """
    if isinstance(batch, Tensor):
        return batch
    if "input_ids" not in batch:
        raise DataError(f"a batch needs 'input_ids'; this one has {sorted(batch) or 'nothing'}.")
    return cast(Tensor, batch["input_ids"])


def _row_entries(batch: MutableMapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a batch that hold one number per token."""
    token_ids(batch)
    entries = {name: batch[name] for name in ROW_ENTRIES if batch.get(name) is not None}
    shapes = {name: tuple(value.shape) for name, value in entries.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"input_ids, labels and attention_mask must be of one shape; got {shapes}. Give labels that are not shifted.")
    return entries
