"""Long documents as the batches of truncated backpropagation: every row reads its document in order, segment by segment.

    reader = DocumentReader([byte_ids(text) for text in books().train], rows=8, segment=512, bos=256)
    tokens, targets, lengths, reset = reader.batch(step)

Which document a row reads at which step follows from the documents' lengths and the seed alone, so that a training that resumes needs
to know its step and nothing else. The plan is made as far as it is asked for; what it keeps grows with the number of rows and, slowly,
with the steps, never with the tokens.

Axes: B rows, T tokens of a segment.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from heapq import heapreplace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.keys import generator

IGNORED = -100
"""Target of a place behind a document's end."""

_DRAWN = 1024
"""Documents whose order is drawn at once: with few documents, a generator for every pass would cost more than the reading."""

_KEPT_EVERY = 4096
"""Segments from one kept place in the plan to the next: as far as a step back is planned again."""


class Segment(NamedTuple):
    """What all rows read in one step."""

    tokens: Tensor
    """(B, T) int64: BOS before a document's first token, else the token before the target; BOS too where nothing is read."""
    targets: Tensor
    """(B, T) int64: what follows each token; -100 where nothing is read."""
    lengths: Tensor
    """(B,) int64: places that are read, from the left."""
    reset: Tensor
    """(B, T) bool: where a document begins, so that the memory of another one must be emptied first."""

    def to(self, device: torch.device | str) -> "Segment":
        """The same on another device."""
        return Segment(*(part.to(device) for part in self))

    def needs(self) -> tuple[bool, bool]:
        """Whether `lengths` and `reset` say anything: a row is padded, a document begins."""
        return bool((self.lengths < self.tokens.shape[1]).any()), bool(self.reset.any())


class _Place:
    """How far the plan is made: the documents that each row holds at a segment, and where each row is free again."""

    def __init__(self, rows: int) -> None:
        self.segment, self.n_taken = 0, 0
        self.free = [(0, row) for row in range(rows)]  # a heap: the row that is free first takes the next document
        self.held: list[list[tuple[int, int]]] = [[] for _ in range(rows)]  # (first token's place in the row, document)

    def copy(self) -> "_Place":
        other = _Place(0)
        other.segment, other.n_taken = self.segment, self.n_taken
        other.free, other.held = list(self.free), [list(row) for row in self.held]
        return other


class DocumentReader:
    """Rows of documents, each read in order and every token scored once, across segments too.

    A pass goes through all documents in an order of its own. There is one queue for all rows: a row that ends its document takes the
    next. With fewer documents than rows, several rows read the same one, in different passes.

    Args:
        documents: ids of each, (n,) of any integer dtype and n >= 1; kept as they are, and sliced when they are read.
        rows: B, documents read side by side; 8 or more keep the processor busy.
        segment: T, tokens per row and step.
        bos: id that stands before a document's first token.
        seed: key of the order.
        pack: whether the next document begins right behind the last, inside a segment. False is the paper's way: it begins with the
            next segment, and the last segment of a document is padded.

    Raises:
        DataError: there is no document, or one is empty, no vector or no integers.
        SettingError: `rows` or `segment` is below 1, or `bos` below 0.

    Source: Wu, Rabe, Hutchins and Szegedy 2022 (Memorizing Transformers, section 3.2: documents in order, one per row), in whose code the
        last token of each segment is never scored. ours: every token is, and documents may share a segment.

    Example:
        >>> reader = DocumentReader([torch.tensor([5, 6, 7])], rows=1, segment=2, bos=9)
        >>> [part.tolist() for part in reader.batch(0)]
        [[[9, 5]], [[5, 6]], [2], [[True, False]]]
        >>> [part.tolist() for part in reader.batch(1)]
        [[[6, 9]], [[7, -100]], [1], [[False, False]]]
    """

    def __init__(self, documents: Sequence[Tensor], rows: int, segment: int, bos: int, seed: int = 0, pack: bool = False) -> None:
        for name, value, least in (("rows", rows, 1), ("segment", segment, 1), ("bos", bos, 0)):
            if value < least:
                raise SettingError(f"DocumentReader: {name}={value} must be {least} or more.")
        if not len(documents):
            raise DataError("DocumentReader: there is no document to read; give at least one.")
        self.documents, self.rows, self.segment, self.bos, self.seed, self.pack = documents, rows, segment, bos, seed, pack
        lengths = require_ids(documents, "DocumentReader")
        if 0 in lengths:
            raise DataError(f"DocumentReader: document {lengths.index(0)} is empty; leave empty documents out.")
        self._spans = lengths if pack else [-(-length // segment) * segment for length in lengths]
        self.n_tokens = sum(lengths)
        """Tokens of all documents."""
        self._passes_drawn = -(-_DRAWN // len(lengths))
        self._drawn: tuple[int, list[int]] = (-1, [])
        self._place = _Place(rows)
        self._kept = {0: self._place.copy()}

    @property
    def segments_per_pass(self) -> float:
        """Steps in which all rows together read as much as all documents hold, padding included."""
        return sum(self._spans) / (self.rows * self.segment)

    def batch(self, step: int) -> Segment:
        """What the rows read at a step, counted from 0: a pure function of it, on the CPU.

        A step back, or far ahead, plans anew from the nearest place that is kept: about a second per million documents.

        Raises:
            SettingError: `step` is below 0.
        """
        if step < 0:
            raise SettingError(f"DocumentReader: step {step} must be 0 or more.")
        shape, begin = (self.rows, self.segment), step * self.segment
        tokens, targets = torch.full(shape, self.bos, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
        lengths, reset = torch.zeros(self.rows, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for row, held in enumerate(self._held(step)):  # each row slices documents of its own: there is nothing to vectorise
            for start, number in held:
                document = self.documents[number]
                first, last = max(0, begin - start), min(len(document), begin + self.segment - start)
                left, right = start + first - begin, start + last - begin
                targets[row, left:right] = document[first:last]
                if first == 0:
                    reset[row, left] = True
                    tokens[row, left + 1 : right] = document[: last - 1]
                else:
                    tokens[row, left:right] = document[first - 1 : last - 1]
                lengths[row] = right
        return Segment(tokens, targets, lengths, reset)

    def settings(self) -> dict[str, Any]:
        """Everything that `batch` depends on, as JSON; the documents by the sha256 of their ids."""
        return {"documents": self._fingerprint} | {name: getattr(self, name) for name in ("rows", "segment", "bos", "seed", "pack")}

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            ids = document.detach().cpu().to(torch.int64).contiguous().numpy()
            digest.update(len(ids).to_bytes(8, "big"))
            digest.update(ids.data)
        return digest.hexdigest()

    # --- plan --------------------------------------------------------------------------------------------------

    def _held(self, segment: int) -> list[list[tuple[int, int]]]:
        """(place of the first token in the row's stream, document) of all documents that each row reads at a segment."""
        if segment < self._place.segment:
            self._place = self._kept[segment // _KEPT_EVERY].copy()
        for stop in range((self._place.segment // _KEPT_EVERY + 1) * _KEPT_EVERY, segment + 1, _KEPT_EVERY):
            self._advance(stop)
            if stop // _KEPT_EVERY not in self._kept:
                self._kept[stop // _KEPT_EVERY] = self._place.copy()
        self._advance(segment)
        return self._place.held

    def _advance(self, segment: int) -> None:
        place, begin, end = self._place, segment * self.segment, (segment + 1) * self.segment
        spans, free, held = self._spans, place.free, place.held
        while free[0][0] < end:
            start, row = free[0]
            document = self._taken(place.n_taken)
            place.n_taken += 1
            stop = start + spans[document]
            heapreplace(free, (stop, row))
            if stop > begin:
                held[row].append((start, document))
        place.held = [[piece for piece in row if piece[0] + spans[piece[1]] > begin] for row in held]
        place.segment = segment

    def _taken(self, number: int) -> int:
        """The document that is taken as number so-and-so, all passes in a row."""
        n = len(self._spans)
        block, place = divmod(number, n * self._passes_drawn)
        if block != self._drawn[0]:
            noise = torch.rand(self._passes_drawn, n, generator=generator(self.seed, "documents", block), dtype=torch.float64)
            self._drawn = (block, noise.argsort(dim=1, stable=True).flatten().tolist())
        return self._drawn[1][place]


def require_ids(documents: Sequence[Tensor], owner: str) -> list[int]:
    """Lengths of documents that are vectors of integers.

    Raises:
        DataError: one is no vector, or holds no integers.
    """
    return [_length(index, document, owner) for index, document in enumerate(documents)]


def _length(index: int, document: Tensor, owner: str) -> int:
    if document.dim() != 1 or document.is_floating_point() or document.is_complex() or document.dtype == torch.bool:
        raise DataError(
            f"{owner}: document {index} has shape {tuple(document.shape)} and dtype {document.dtype}; give a vector of integer ids."
        )
    return len(document)
