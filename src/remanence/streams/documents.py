"""Long documents, each read from its beginning and then gone on with: the stream of models that carry a context.

Axes: N rows; T bytes of a row.
"""

import torch

from remanence.errors import DataError, SettingError
from remanence.keys import generator
from remanence.streams._cut import CutStream
from remanence.streams.long_documents import BYTE_BOS, IDS_EVERY, byte_ids, document_name, place_ids
from remanence.streams.text import TextSource
from remanence.task import Data, Event, Task, concatenate, example_ids


def documents(
    source: TextSource, window: int = 256, n_windows: int = 64, n_test: int = 8, n_documents: int = 4,
    forget: tuple[int, int] | None = None, never: bool = False, order_seed: int = 0,
) -> CutStream:  # fmt: skip
    """A task for each of the source's test documents: its first windows are read in order, those that follow are the test.

    Inputs and targets are bytes (N, T); the first input of a document is BOS, 256. What pretrains on the source's train documents has seen
    none of it. Test windows are asked one by one, each as if it followed what was read.

    With `forget`, a task has two parts, "..., continued", which is tested on what follows, and "..., windows 8 to 15", whose test are these
    windows themselves, asked again after the reading. When all documents are read, that part of each is to be forgotten.

    Args:
        source: its test documents of (n_windows + n_test) x window bytes or more are read.
        window: T, bytes of a row, 64 or more.
        n_windows: rows that are read of each document.
        n_test: rows that are tested on.
        n_documents: how many documents.
        forget: first row of the segment that is forgotten, and the row behind it.
        never: the control: the segment is asked for but neither read nor forgotten.
        order_seed: what the choice of documents and their order are drawn from.

    Raises:
        SettingError: a number is out of range, or `never` without `forget`.
        DataError: too few documents are that long.

    Example:
        >>> source = TextSource("pair", train=("One.",), test=("first " * 99, "second " * 99))
        >>> stream = documents(source, window=64, n_windows=4, n_test=2, n_documents=2, forget=(1, 3))
        >>> [(event.verb, event.task.name, len(event.task.train)) for event in stream][1:3]
        [('learn', 'document 1', 4), ('forget', 'document 0, windows 1 to 2', 2)]
    """
    return _Documents(source, (window, n_windows, n_test, n_documents), forget, never, order_seed)


class _Documents(CutStream):
    def __init__(
        self, source: TextSource, sizes: tuple[int, int, int, int], forget: tuple[int, int] | None, never: bool, order_seed: int
    ) -> None:
        _check(sizes, forget, never)
        self._window, self._n_read, self._n_test, n_documents = sizes
        self._segment, self._never = forget, never
        ending = "" if forget is None else ", a segment never read" if never else ", a segment forgotten"
        content = [source.name, source.fingerprint(), list(sizes), forget, never, order_seed]
        super().__init__(f"{source.name}, documents{ending}", content, task_id_at_test=True)
        found = {number: byte_ids(text) for number, text in enumerate(source.test)}
        n_bytes = (self._n_read + self._n_test) * self._window
        long = [number for number, ids in found.items() if len(ids) >= n_bytes]
        if len(long) < n_documents:
            raise DataError(
                f"'{source.name}' has {len(long)} test documents of {n_bytes} bytes or more, n_documents={n_documents}; take fewer, or "
                f"shorter parts of them (n_windows, n_test, window)."
            )
        order = torch.randperm(len(long), generator=generator("order", order_seed))[:n_documents].tolist()
        self._chosen = [(long[place], found[long[place]]) for place in order]

    def __len__(self) -> int:
        n_forgotten = len(self._chosen) if self._segment is not None and not self._never else 0
        return len(self._chosen) + n_forgotten

    def build(self, index: int) -> Event:
        if index < len(self._chosen):
            return Event("learn", self._document(*self._chosen[index]))
        segment = self[index - len(self._chosen)].task.parts[1]
        return Event("forget", segment)

    def _document(self, number: int, ids: torch.Tensor) -> Task:
        table, name = self._table(ids), f"document {number}"
        rows = torch.arange(self._n_read)
        following = table.select(torch.arange(self._n_read, len(table)))
        if self._segment is None:
            return Task(name, table.select(rows), following, answer="tokens")
        first, end = self._segment
        is_segment = (rows >= first) & (rows < end)
        segment, rest = table.select(rows[is_segment]), table.select(rows[~is_segment])
        again = Data(segment.inputs, segment.targets, example_ids(f"{document_name(ids)}, asked again", rows[is_segment]), ordered=True)
        parts = (
            Task(f"{name}, continued", rest, following, answer="tokens"),
            Task(f"{name}, windows {first} to {end - 1}", None if self._never else segment, again, answer="tokens"),
        )
        read = rest if self._never else table.select(rows)
        return Task(name, read, concatenate(part.test for part in parts), answer="tokens", parts=parts)

    def _table(self, ids: torch.Tensor) -> Data:
        n_rows = self._n_read + self._n_test
        targets = ids[: n_rows * self._window]
        inputs = torch.cat([torch.tensor([BYTE_BOS]), targets[:-1]])
        places = torch.arange(n_rows) * self._window
        shape = (n_rows, self._window)
        return Data(inputs.view(shape), targets.clone().view(shape), place_ids(ids, places), ordered=True)


def _check(sizes: tuple[int, int, int, int], forget: tuple[int, int] | None, never: bool) -> None:
    window, n_windows, n_test, n_documents = sizes
    if window < IDS_EVERY:
        raise SettingError(f"window: {window} bytes; give {IDS_EVERY} or more, so that every row has an id of its own.")
    for name, value in (("n_windows", n_windows), ("n_test", n_test), ("n_documents", n_documents)):
        if value < 1:
            raise SettingError(f"{name}: {value}; give 1 or more.")
    if forget is not None and not (0 <= forget[0] < forget[1] <= n_windows and forget[1] - forget[0] < n_windows):
        raise SettingError(f"forget: {list(forget)} is no part of rows 0 to {n_windows}; give its first row and the row behind it.")
    if never and forget is None:
        raise SettingError("never: true leaves out the segment that forget: names; give forget: too.")
