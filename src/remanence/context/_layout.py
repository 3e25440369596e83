"""How the tokens of a call fall into windows, row by row.

Every row has a window grid of its own: it begins anew at every document, and a call may begin and end anywhere in a window. The tokens of
a partial window are read again by the next call, so that a window is always computed from its first token; memory is written only by
windows that are complete. All of it is index arithmetic over (B, T); no row is treated by itself.

Axes: B rows; T tokens of the call; K windows of the call; W tokens of a window.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from remanence.context.state import ContextState

_NOWHERE = 1 << 40

@dataclass(frozen=True)
class Layout:
    """The windows of a call.

    Args:
        tokens: (B, K, W) ids; places without a token hold 0.
        n_valid: (B, K) int64, tokens in each window; they stand at its left.
        index: (B, K) int64, the window's number in its document; 0 begins one. Windows without a token have a number beyond all others.
        resets: (B, K) int64, how many documents began in this call up to and including the window.
        n_begun: (B,) int64, how many documents began in this call.
        where: (B, T) place in K x W of each new token, or None when the call is the windows themselves, all complete.
    """

    tokens: Tensor
    n_valid: Tensor
    index: Tensor
    resets: Tensor
    n_begun: Tensor
    where: Tensor | None

    @property
    def n_windows(self) -> int:
        """K."""
        return self.tokens.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether every window of every row is complete, and documents begin with the call if at all."""
        return self.where is None

    @cached_property
    def is_full(self) -> Tensor:
        """(B, K) bool: the window is complete."""
        return self.n_valid == self.tokens.shape[2]

    @cached_property
    def writes(self) -> Tensor:
        """(B, K) bool: complete, and of the row's last document, so that what it writes outlives the call."""
        return self.is_full & (self.resets == self.n_begun[:, None])

    @cached_property
    def least_index(self) -> list[int]:
        """For each window, the lowest number that it has in any row: how much past all rows have."""
        least: list[int] = self.index.amin(0).tolist()
        return least

    def gather(self, x: Tensor) -> Tensor:
        """What the new tokens became: x (B, K, W, d) -> (B, T, d)."""
        flat = x.flatten(1, 2)
        return flat if self.where is None else flat.gather(1, self.where[..., None].expand(-1, -1, x.shape[-1]))

    def advance(self, state: ContextState) -> dict[str, Tensor]:
        """The bookkeeping fields after the call."""
        n_windows = state.n_windows.masked_fill(self.n_begun > 0, 0) + self.writes.sum(1)
        last = (self.n_valid > 0).sum(1).sub(1).clamp_min(0)
        n_rest = self.n_valid.masked_fill(self.is_full, 0).gather(1, last[:, None])[:, 0]
        tail = self.tokens[torch.arange(len(last), device=last.device), last]
        n_tokens = n_windows * self.tokens.shape[2] + n_rest
        return {"n_windows": n_windows, "n_tokens": n_tokens, "document": state.document + self.n_begun, "tail": tail}


def lay_out(tokens: Tensor, state: ContextState, lengths: Tensor | None, reset: Tensor | None) -> Layout:
    """The windows of a call.

    Args:
        tokens: (B, T) ids, B and T above 0.
        state: what the rows have read before.
        lengths: (B,) how many of the T tokens are there; None is all of them.
        reset: (B, T) bool, tokens that begin a document; None is none of them.
    """
    window = state.tail.shape[1]
    n_tail = state.n_tail
    begins = None if reset is None else reset[:, 0] if lengths is None else reset[:, 0] & (lengths > 0)
    if begins is not None:
        n_tail = n_tail.masked_fill(begins, 0)
    is_regular = tokens.shape[1] % window == 0 and lengths is None and (reset is None or not bool(reset[:, 1:].any()))
    if is_regular and not bool(n_tail.any()):
        return _whole(tokens, state, begins)
    return _ragged(tokens, state, n_tail, lengths, reset)


def _whole(tokens: Tensor, state: ContextState, begins: Tensor | None) -> Layout:
    grid = tokens.view(len(tokens), -1, state.tail.shape[1])
    n_begun = torch.zeros_like(state.n_windows) if begins is None else begins.long()
    first = state.n_windows.masked_fill(n_begun > 0, 0)
    n_windows = grid.shape[1]
    return Layout(
        grid, torch.full_like(grid[..., 0], grid.shape[2]), first[:, None] + torch.arange(n_windows, device=grid.device),
        n_begun[:, None].expand(-1, n_windows), n_begun, None,
    )  # fmt: skip


def _ragged(tokens: Tensor, state: ContextState, n_tail: Tensor, lengths: Tensor | None, reset: Tensor | None) -> Layout:
    (batch, length), window, device = tokens.shape, state.tail.shape[1], tokens.device
    step = torch.arange(length, device=device)
    is_there = torch.ones_like(tokens, dtype=torch.bool) if lengths is None else step < lengths[:, None]
    begins = torch.zeros_like(is_there) if reset is None else reset & is_there
    resets = begins.cumsum(1)
    since = torch.where(begins, step, -1).cummax(1).values
    place = torch.where(since >= 0, step - since, n_tail[:, None] + step)  # in the document, from the start of the open window
    opens = (place % window == 0) & (step > 0)
    cell = opens.cumsum(1).masked_fill(~is_there, 0)
    n_cells = int(cell.max()) + 1

    def fill(values: Tensor, first: Tensor) -> Tensor:
        """A value for each window, from those of its tokens; `first` stands for rows whose first window has the tail alone."""
        out = torch.zeros(batch, n_cells, dtype=torch.int64, device=device)
        out[:, 0] = first
        return out.scatter_reduce(1, cell, values.masked_fill(~is_there, -1), "amax")

    number = place // window + torch.where(since >= 0, 0, state.n_windows[:, None])
    n_valid = torch.zeros(batch, n_cells, dtype=torch.int64, device=device).scatter_add(1, cell, is_there.long())
    n_valid[:, 0] += n_tail
    where = cell * window + place % window
    flat = torch.zeros(batch, n_cells * window + 1, dtype=torch.int64, device=device)  # one place more, for tokens that are not there
    flat.scatter_(1, where.masked_fill(~is_there, n_cells * window), tokens)
    grid = flat[:, :-1].view(batch, n_cells, window)
    kept = torch.arange(window, device=device) < n_tail[:, None]
    grid[:, 0] = torch.where(kept, state.tail, grid[:, 0])
    index = fill(number, torch.where(n_tail > 0, state.n_windows, 0)).masked_fill(n_valid == 0, _NOWHERE)
    where = where.clamp_max(n_cells * window - 1)
    return Layout(grid, n_valid, index, fill(resets, torch.zeros_like(n_tail)), resets[:, -1], where)
