"""One call of an attached memory: what goes through the host's blocks from memory layer to memory layer, and what is left behind.

Axes: B rows; K windows of the call; W tokens of a window; D the host's width; V vocabulary; m memory width; n memory layers; S short, U
summary, L long tokens a window; Q windows in the queue.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.context._attached_layer import Schedule
from remanence.context._layout import Layout
from remanence.context._ring import RingView, committed


def visible_entries(window: Tensor, layout: Layout) -> tuple[int, Tensor]:
    """Which entries of the queue the windows of a call may read.

    Args:
        window: (B, Q), the window that each place of the ring came from.
        layout: of the call.

    Returns:
        How many places of the ring hold anything in any row, and (B, K, places + K) bool over these and the windows of the call.
    """
    view = RingView(window, layout)
    n_used, found = view.n_used, []
    for number in range(layout.n_windows):
        found.append(F.pad(view.seen(number), (0, layout.n_windows - number)))
        view.add(number)
    return n_used, torch.stack(found, 1)


class AttachedCall:
    """What travels along the host's blocks.

    Args:
        layers: the memory layers.
        seeds: (U, m), the summary that the first of them reads with; None without layers.
        layout: the windows of the call.
        state: an `AttachedMelodiState`, what the rows have read before.
    """

    def __init__(self, layers: nn.ModuleList, seeds: Tensor | None, layout: Layout, state: Any) -> None:
        self.layers, self.layout, self.state = layers, layout, state
        self.batch, self.n_windows, width = layout.tokens.shape
        if self.n_windows == 1:
            width = max(1, int(layout.n_valid.max()))  # nothing behind the last token need be computed
        self.ids = layout.tokens[..., :width].flatten(0, 1)
        n_used, is_visible = visible_entries(state.long_window, layout)
        self.queue = state.long[:, :, :n_used].flatten(1, 3)
        self.schedule = Schedule(
            layout.index > 0, layout.is_full, (layout.index == 0) & (layout.n_valid > 0),
            is_visible.repeat_interleave(state.long.shape[3], 2), bool(layout.is_full.any()),
        )  # fmt: skip
        self.summary = None if seeds is None else seeds.expand(self.batch, self.n_windows, -1, -1)
        self._short: list[Tensor] = []
        self._long: Tensor | None = None

    def visit(self, number: int, block: nn.Module, arguments: Any, output: Any) -> Any:
        """A forward hook: memory layer `number` behind its block."""
        hidden = output[0] if isinstance(output, tuple) else output
        layer: Any = self.layers[number]
        old = self.queue if layer.sizes.long else self.queue[:, :0]
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
        memory = {"short": self.state.short, "long": self.state.long, "long_window": self.state.long_window}
        if self._short:
            memory["short"] = torch.stack(self._short, 1).to(self.state.short.dtype)
        if self._long is not None:
            ring, memory["long_window"] = committed(self.state.long[:, 0], self.state.long_window, self._long, self.layout)
            memory["long"] = ring[:, None].to(self.state.long.dtype)
        return memory | self.layout.advance(self.state)
