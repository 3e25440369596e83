"""One call of an attached memory: what goes through the host's blocks from memory layer to memory layer, and what is left behind.

Axes: B rows; K windows of the call; W tokens of a window; D the host's width; V vocabulary; m memory width; n memory layers; S short, U
summary, L long tokens a window; N length of the queue; P entries: the old ones, then L of each window.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.context._attached_layer import Schedule
from remanence.context._layout import Layout


@dataclass(frozen=True)
class Entries:
    """The queue's entries of a call, by when they were written.

    Args:
        old: (B, P - K L, m), what was in the queue; the fullest row decides how many columns there are.
        is_old: (B, P - K L) bool, which of them hold something.
        length: N.
        per_window: L.
    """

    old: Tensor
    is_old: Tensor
    length: int
    per_window: int

    @classmethod
    def of(cls, state: Any, per_window: int) -> "Entries":
        """Those of a state: its last L n_windows entries, or all."""
        length = state.long.shape[1]
        n_filled = (state.n_windows * per_window).clamp_max(length)
        n_columns = int(n_filled.max()) if length else 0
        is_old = torch.arange(n_columns, device=n_filled.device) >= n_columns - n_filled[:, None]
        return cls(state.long[:, length - n_columns :], is_old, length, per_window)

    def visible(self, layout: Layout) -> Tensor:
        """(B, K, P): entries of the same document, of earlier windows, and among the newest N of those."""
        window = torch.arange(layout.n_windows, device=self.old.device)
        resets, newer = layout.resets, window.repeat_interleave(self.per_window)
        old = (resets == 0)[..., None] & self.is_old[:, None]
        new = (resets[..., None] == resets[:, newer][:, None]) & layout.is_full[:, newer][:, None] & (newer < window[:, None])
        found = torch.cat([old, new], 2)
        n_since = found.flip(2).cumsum(2).flip(2)
        return found & (n_since <= self.length)

    def after(self, long: Tensor, layout: Layout) -> Tensor:
        """The queue (B, N, m) after entries (B, K, L, m) came in: the newest N of each row's document, at the right."""
        pool = torch.cat([self.old, long.flatten(1, 2)], 1)
        is_kept = torch.cat([self.is_old & (layout.n_begun == 0)[:, None], layout.writes.repeat_interleave(self.per_window, 1)], 1)
        pool, is_kept = F.pad(pool, (0, 0, self.length, 0)), F.pad(is_kept, (self.length, 0))
        order = is_kept.long().argsort(dim=1, stable=True)[:, is_kept.shape[1] - self.length :]
        pool = pool.masked_fill(~is_kept[..., None], 0.0)
        return pool.gather(1, order[..., None].expand(-1, -1, pool.shape[2]))


class AttachedCall:
    """What travels along the host's blocks.

    Args:
        layers: the memory layers.
        seeds: (U, m), the summary that the first of them reads with; None without layers.
        layout: the windows of the call.
        state: what the rows have read before.
        per_window: L.
    """

    def __init__(self, layers: nn.ModuleList, seeds: Tensor | None, layout: Layout, state: Any, per_window: int) -> None:
        self.layers, self.layout, self.state = layers, layout, state
        self.entries = Entries.of(state, per_window)
        self.batch, self.n_windows, width = layout.tokens.shape
        if self.n_windows == 1:
            width = max(1, int(layout.n_valid.max()))  # nothing behind the last token need be computed
        self.ids = layout.tokens[..., :width].flatten(0, 1)
        self.schedule = Schedule(
            layout.index > 0, layout.is_full, (layout.index == 0) & (layout.n_valid > 0), self.entries.visible(layout),
            bool(layout.is_full.any()),
        )  # fmt: skip
        self.summary = None if seeds is None else seeds.expand(self.batch, self.n_windows, -1, -1)
        self._short: list[Tensor] = []
        self._long: Tensor | None = None

    def visit(self, number: int, block: nn.Module, arguments: Any, output: Any) -> Any:
        """A forward hook: memory layer `number` behind its block."""
        hidden = output[0] if isinstance(output, tuple) else output
        layer: Any = self.layers[number]
        old = self.entries.old if layer.sizes.long else self.entries.old[:, :0]
        passed = layer(
            hidden.view(self.batch, self.n_windows, *hidden.shape[1:]), self.summary, self.state.short[:, number].to(layer.up.weight.dtype),
            old.to(layer.up.weight.dtype), self.schedule,
        )  # fmt: skip
        self.summary = passed.summary
        self._short.append(passed.short)
        if layer.sizes.long:
            self._long = passed.long
        hidden = passed.hidden.flatten(0, 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def gather(self, logits: Tensor) -> Tensor:
        """The new tokens' logits (B, T, V) of those of all windows."""
        layout, width = self.layout, logits.shape[1]
        if layout.where is not None:  # places of padding point anywhere in the window
            layout = replace(layout, where=layout.where.clamp_max(self.n_windows * width - 1))
        return layout.gather(logits.view(self.batch, self.n_windows, *logits.shape[1:]))

    def after(self) -> dict[str, Tensor]:
        """All fields of the state after the call."""
        memory = {"short": self.state.short, "long": self.state.long}
        if self._short:
            memory["short"] = torch.stack(self._short, 1).to(self.state.short.dtype)
        if self._long is not None:
            memory["long"] = self.entries.after(self._long, self.layout).to(self.state.long.dtype)
        return memory | self.layout.advance(self.state)
