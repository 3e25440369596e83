"""A ring of what the last Q windows left behind: who sees which entry, and what stands in it after a call.

What window w left stands at w mod Q, so that nothing is ever moved and the oldest is overwritten. Entries have no order of their own:
what reads them uses no positions.

Axes: B rows; K windows of a call; Q windows in the ring.
"""

import torch
from torch import Tensor

from remanence.context._layout import Layout

NEVER = -1
"""Number of a window that no place of a ring came from."""


class RingView:
    """Whose entries the windows of a call see: those of the ring, then those that the call itself adds.

    Args:
        window: (B, Q) int64, the window that each place came from, or `NEVER`.
        layout: of the call.
    """

    def __init__(self, window: Tensor, layout: Layout) -> None:
        self.layout, self.n_kept = layout, window.shape[1]
        is_there = (window >= 0).any(0)
        # a ring fills from its beginning: what no row has written yet need not be read
        self.n_used = int(is_there.nonzero().max()) + 1 if bool(is_there.any()) else 0
        self.window = window[:, : self.n_used]
        self.document = torch.zeros_like(self.window)

    def seen(self, number: int) -> Tensor:
        """(B, P) bool: exactly the Q windows of the document before the call's window `number`."""
        index, resets = self.layout.index[:, number, None], self.layout.resets[:, number, None]
        is_near = (self.window >= 0) & (self.window < index) & (self.window >= index - self.n_kept)
        return is_near & (self.document == resets)

    def add(self, number: int) -> None:
        """The call's window `number` has left its entry; in rows where it is not complete nobody sees it."""
        layout = self.layout
        written = torch.where(layout.is_full[:, number], layout.index[:, number], NEVER)
        self.window = torch.cat([self.window, written[:, None]], 1)
        self.document = torch.cat([self.document, layout.resets[:, number, None]], 1)


def committed(ring: Tensor, window: Tensor, added: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The ring (B, Q, ...) and its windows (B, Q) after a call that added (B, K, ...).

    A window that a later one of the same call pushes out is never written.
    """
    n_kept = window.shape[1]
    place = torch.arange(n_kept, device=window.device)
    last = torch.where(layout.writes, layout.index, NEVER).amax(1, keepdim=True)
    newest = last - (last - place) % n_kept  # the latest window that falls on each place (B, Q)
    comes = (layout.index[:, :, None] == newest[:, None]) & layout.writes[:, :, None]  # (B, K, Q)
    is_new, source = comes.any(1), comes.int().argmax(1)
    chosen = added[torch.arange(len(added), device=added.device)[:, None], source]
    held = torch.where(layout.n_begun[:, None] > 0, NEVER, window)
    ones = [1] * (ring.dim() - 2)
    old = ring.to(added.dtype)
    if bool((held != window).any()):
        old = torch.where((held >= 0).view(*held.shape, *ones), old, 0.0)
    return torch.where(is_new.view(*is_new.shape, *ones), chosen, old), torch.where(is_new, newest, held)
