"""What a learner keeps of one document: the state after it, where its rows stand, and the way back.

Axes: R rows; n tokens of all rows; Q windows of a state's queue.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from remanence.context.state import ContextState
from remanence.state import State, copy_state


@dataclass
class ReadDocument:
    """A document that is being read row by row.

    Args:
        state: after the rows before `n_read`; of one row.
        names: what the document and its parts are called when they are asked for.
        ids: (R,) int64, of the rows that are to be read, in order.
        spans: (R, 2) int64, the document's tokens that a row became: the first, and the one behind the last.
        lengths: (R,) int64, tokens of each row.
        text: (n,) int32, the tokens of all rows; empty where nothing is to be read again.
        n_read: how many rows have been read; the others wait.
        snapshots: (row, state before that row was read), on the CPU.
    """

    state: Any
    names: list[str]
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    spans: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    lengths: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    text: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    n_read: int = 0
    snapshots: list[tuple[int, Any]] = field(default_factory=list)

    # --- reading -----------------------------------------------------------------------------------------------

    def append(self, tokens: Tensor, row_id: Tensor, keeps_text: bool) -> None:
        """Put a row (T,) behind the others, to be read next."""
        self.ids = torch.cat([self.ids, row_id.view(1)])
        self.spans = torch.cat([self.spans, self.spans.new_zeros(1, 2)])
        self.lengths = torch.cat([self.lengths, self.lengths.new_tensor([len(tokens)])])
        if keeps_text:
            self.text = torch.cat([self.text, tokens.to("cpu", torch.int32)])

    def waiting(self) -> Tensor:
        """(T,) int64: the tokens of the first row that was not read yet."""
        begin = int(self.lengths[: self.n_read].sum())
        return self.text[begin : begin + int(self.lengths[self.n_read])].long()

    def keep_snapshot(self) -> None:
        """Note the state as the one before the next row."""
        self.snapshots = [*self.snapshots, (self.n_read, self.state.to("cpu"))]

    def advance(self, state: Any) -> None:
        """The next row was read; `state` is what came of it."""
        self.spans[self.n_read] = torch.cat([self.state.n_tokens, state.n_tokens]).cpu()
        self.state, self.n_read = state, self.n_read + 1

    # --- forgetting --------------------------------------------------------------------------------------------

    def last_snapshot(self, gone: Tensor) -> int:
        """The row from which reading must begin anew where rows (R,) bool go: the latest with a snapshot, or 0."""
        first = min(int(gone.nonzero()[0]) if bool(gone.any()) else len(gone), self.n_read)
        if first == self.n_read:
            return first
        return max((row for row, _ in self.snapshots if row <= first), default=0)

    def go_back(self, gone: Tensor, empty: ContextState) -> None:
        """Drop rows (R,) bool and return to the state before the first of them, or earlier; `empty` is that before row 0."""
        back = self.last_snapshot(gone)
        if back < self.n_read:
            kept = dict(self.snapshots)
            self.state = kept[back].to(empty.n_tokens.device) if back else empty
            self.snapshots = [(row, state) for row, state in self.snapshots if row < back]  # it is taken again on the way
        self._drop_rows(gone)
        self.n_read = back

    def empty_slots(self, gone: Tensor) -> None:
        """Drop rows (R,) bool, and of all states what was written from windows that hold a token of them."""
        window = self.state.tail.shape[1]
        first, last = self.spans[gone].unbind(1)
        numbers = torch.arange(int(last.max() - 1) // window + 1)
        is_touched = ((first < (numbers[:, None] + 1) * window) & (last > numbers[:, None] * window)).any(1)
        windows = numbers[is_touched]
        self.state = _without(self.state, windows)
        n_gone = gone.cumsum(0)
        self.snapshots = [(row - int(n_gone[row - 1]), _without(state, windows)) for row, state in self.snapshots]
        self._drop_rows(gone)
        self.n_read -= int(gone.sum())
        self.spans = self.spans.clamp_max(int(self.state.n_tokens))  # where a partial window went, the next row begins

    def _drop_rows(self, gone: Tensor) -> None:
        if len(self.text):
            self.text = self.text[~gone.repeat_interleave(self.lengths)]
        self.ids, self.spans, self.lengths = self.ids[~gone], self.spans[~gone], self.lengths[~gone]

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        tables = {name: getattr(self, name) for name in ("names", "ids", "spans", "lengths", "text", "n_read")}
        return {
            **tables,
            "state": self.state.state_dict(),
            "snapshots": [{"row": row, "state": state.state_dict()} for row, state in self.snapshots],
        }

    @classmethod
    def from_state_dict(cls, saved: State, model: Any) -> "ReadDocument":
        """Inverse of `state_dict`, for the model that read it; copies."""
        tables = {name: value for name, value in saved.items() if name not in ("state", "snapshots")}
        snapshots = [(entry["row"], model.restore_state(entry["state"]).to("cpu")) for entry in saved["snapshots"]]
        return cls(state=model.restore_state(saved["state"]), snapshots=snapshots, **copy_state(tables))


def _without(state: Any, windows: Tensor) -> Any:
    """A state without what these windows wrote; the text of the partial window goes as a whole, where it is one of them."""
    state = state.forget(windows)
    if not bool(torch.isin(state.n_windows.cpu(), windows).any()):
        return state
    return replace(state, n_tokens=state.n_windows * state.tail.shape[1], tail=torch.zeros_like(state.tail), cache=None)
