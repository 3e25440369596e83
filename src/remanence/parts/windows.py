"""Text as a table of next-token windows.

Axes: N windows; T tokens predicted per window.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.task import Data, example_ids

_BATCH_CHARACTERS = 1 << 20


def windows(texts: Iterable[str], tokenizer: Any, length: int, source_name: str) -> Data:
    """Documents packed into windows of equal length.

    The documents' tokens stand one after the other, each closed by the tokenizer's EOS where it has one, and are cut every
    `length` tokens. Every token but the first is predicted once; what is left of the last window is dropped. Special
    tokens of the tokenizer's template (BOS) are not added.

    Args:
        texts: documents; read once, about a megabyte at a time. Blank ones are skipped.
        tokenizer: a `transformers` tokenizer.
        length: T, 1 or more.
        source_name: named in the ids: the n-th window of a source has one id. Give train and test different names.

    Returns:
        inputs (N, T), targets (N, T) int64: targets[i, t] follows inputs[i, t].

    Raises:
        SettingError: `length` is below 1.
        DataError: the text fills no window.
    """
    if length < 1:
        raise SettingError(f"length: {length} tokens; give 1 or more.")
    batches = [_tokens(batch, tokenizer) for batch in _batches(texts)]
    stream = torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)
    n = (len(stream) - 1) // length
    if n < 1:
        raise DataError(
            f"'{source_name}' has {len(stream)} tokens, one window of {length} needs {length + 1}. Give more text or shorter windows."
        )
    inputs, targets = stream[: n * length], stream[1 : n * length + 1].clone()  # no memory shared: either may be written into
    return Data(inputs.view(n, length), targets.view(n, length), example_ids(source_name, torch.arange(n)))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, n_characters = [], 0
    for text in texts:
        if not text.strip():
            continue
        batch.append(text)
        n_characters += len(text)
        if n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _tokens(texts: list[str], tokenizer: Any) -> Tensor:
    """The batch's documents as one row of ids."""
    # not verbose: a document longer than the model's context is no mistake here
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64)
