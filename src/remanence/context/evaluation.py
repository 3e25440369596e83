"""How well a model reads documents: the loss of every token, and its mean by position in the document.

    losses = document_losses(model, [byte_ids(text) for text in source.test], bos=256)
    print(bits_by_position(losses, edges=[0, 1024, 4096, 16384, 65536]))

A memory that helps shows as fewer bits further in. With byte ids, bits per token are bits per byte.

Axes: B rows, T tokens of a segment.

Example:
    >>> bits_by_position([torch.tensor([0.6931, 0.6931, 1.3863]), torch.tensor([2.0794])], edges=[0, 1, 4]).round(2)
       from  to  n_tokens  bits
    0     0   1         2   2.0
    1     1   4         2   1.5
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from remanence.context.documents import IGNORED, require_ids
from remanence.errors import SettingError
from remanence.parts.language_model import evaluating

if TYPE_CHECKING:
    import pandas as pd


def document_losses(model: nn.Module, documents: Sequence[Tensor], bos: int, rows: int = 8, segment: int = 512) -> list[Tensor]:
    """The loss of every token of every document, each document read from its beginning with an empty memory.

    Documents of similar length are read side by side; a row whose document has ended is dropped. No gradient is kept, no state is
    touched, and the model's mode and the global random state are as before.

    Args:
        model: a `ContextLM`, or anything with its `init_state` and call.
        documents: ids of each, (n,) of any integer dtype; n may be 0.
        bos: id before a document's first token.
        rows: B, documents read side by side.
        segment: T, tokens per row and call; changes speed, and nothing else beyond rounding. Logits take B x T x V floats.

    Returns:
        For every document, in the order given, (n,) float32 on the CPU: nats of each token given all before it.

    Raises:
        DataError: a document is no vector of integers.
        SettingError: `rows` or `segment` is below 1.
    """
    for name, value in (("rows", rows), ("segment", segment)):
        if value < 1:
            raise SettingError(f"document_losses: {name}={value} must be 1 or more.")
    lengths = require_ids(documents, "document_losses")
    order = sorted(range(len(documents)), key=lambda index: -lengths[index])
    losses = [torch.empty(length) for length in lengths]
    with evaluating(model):
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            _read(model, [documents[index] for index in chosen], [losses[index] for index in chosen], bos, segment)
    return losses


def _read(model: Any, documents: list[Tensor], losses: list[Tensor], bos: int, segment: int) -> None:
    """Fill in the losses of documents that are ordered by length, longest first."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    state = model.init_state(len(documents))
    n_rows = len(documents)
    for begin in range(0, len(documents[0]), segment):
        n_left = sum(len(document) > begin for document in documents)
        if n_left < n_rows:
            state, n_rows = state.index_select(torch.arange(n_left, device=device)), n_left
        tokens, targets = (part.to(device) for part in _segment(documents[:n_rows], begin, begin + segment, bos))
        lengths = (targets >= 0).sum(1)
        # models take a shorter way where no row is padded
        logits, state = model(tokens, state, lengths=None if bool((lengths == tokens.shape[1]).all()) else lengths)
        found = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
        for row, n, table in zip(found.view_as(targets).cpu(), lengths.tolist(), losses[:n_rows], strict=True):
            table[begin : begin + n] = row[:n]


def _segment(documents: list[Tensor], begin: int, end: int, bos: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T) of the places from `begin` to `end`, or to where the longest document ends."""
    targets = [document[begin:end].to(torch.int64) for document in documents]
    before = [document[begin - 1 : begin] if begin else document.new_full((1,), bos, dtype=torch.int64) for document in documents]
    tokens = [torch.cat([first.to(target), target[:-1]]) for first, target in zip(before, targets, strict=True)]
    return pad_sequence(tokens, True, bos), pad_sequence(targets, True, IGNORED)


def bits_by_position(losses: Sequence[Tensor], edges: Sequence[int]) -> "pd.DataFrame":
    """Mean bits per token by position in the document, over the tokens of all documents.

    Args:
        losses: nats of each document's tokens, as `document_losses` returns them.
        edges: increasing positions, 0 or more; a row of the table goes from one of them up to the next, which it excludes. Tokens
            outside are not counted.

    Returns:
        A table with the columns from, to, n_tokens, bits; bits are NaN where no document reaches.

    Raises:
        SettingError: fewer than two edges, a negative one, or they do not increase.
    """
    import pandas as pd  # takes half a second to import

    edges = list(edges)
    if len(edges) < 2 or edges[0] < 0 or any(left >= right for left, right in pairwise(edges)):
        raise SettingError(f"bits_by_position: edges={edges}; give two or more increasing positions, the first 0 or above.")
    counts, sums = torch.zeros(len(edges) - 1, dtype=torch.int64), torch.zeros(len(edges) - 1, dtype=torch.float64)
    for document in losses:
        place = torch.bucketize(torch.arange(len(document)), torch.tensor(edges), right=True) - 1
        counted = (place >= 0) & (place < len(counts))
        counts += torch.bincount(place[counted], minlength=len(counts))
        sums.index_add_(0, place[counted], document[counted].double())
    bits = (sums / counts / math.log(2)).tolist()
    return pd.DataFrame({"from": edges[:-1], "to": edges[1:], "n_tokens": counts.tolist(), "bits": bits})
