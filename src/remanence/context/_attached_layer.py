"""One memory layer of an attached MELODI: it stands behind a frozen block, reads memory into its output and writes memory from it.

A narrow copy of the block's output (m numbers a token) attends to the short-term memory that the previous window left, and in the long
layer to the queue; what it finds goes back through an output projection that begins at zero. Summary tokens attend to the memory and to the
narrow copy, and three linear maps over the token axis make of them the next layer's summary, the next window's memory and the queue's new
entries.

A window meets other windows in memory alone, so that a block can run all windows of a call in one batch, and the memory layer behind it
too: only its U summary tokens go window by window.

Source: Chen et al. 2024, MELODI (arXiv 2410.03156). ours: the width m; tokens read memory only (the host's own attention joins them to each
other); beside all memory lies a key of zeros with a value of zeros, so that a token can leave memory alone, and an empty memory is nothing.

Axes: B rows; K windows of the call; W tokens of a window; D the host's width; m memory width; h heads, e their size; S short, U summary,
L long tokens a window; N entries of the queue before the call.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.context._melodi_layer import TokenMixer
from remanence.context.body import Attention, FeedForward, PositionBias, RMSNorm, attend, with_sink
from remanence.context.configuration import ContextConfig

Pair = tuple[Tensor, Tensor]


class Sizes(NamedTuple):
    """S, U and L of a memory layer; L is 0 in all but the long one."""

    short: int
    summary: int
    long: int


class Schedule(NamedTuple):
    """Which windows find a memory and which write one; the same for all layers.

    Args:
        is_known: (B, K) bool, whether the window has a predecessor in its document.
        is_full: (B, K) bool, whether it completes and writes.
        begins: (B, K) bool, whether it begins a document: what is older is dropped before it.
        visible: (B, K, N + K L) bool, entries of the queue (the old ones, then L of each window) that the window may read.
        writes: whether any window completes.
    """

    is_known: Tensor
    is_full: Tensor
    begins: Tensor
    visible: Tensor
    writes: bool


class Passed(NamedTuple):
    """What a memory layer makes of a call.

    Args:
        hidden: (B, K, W, D), for the next block.
        summary: (B, K, U, m), for the next memory layer.
        short: (B, S, m), short-term memory after the last window.
        long: (B, K, L, m), new entries of the queue.
    """

    hidden: Tensor
    summary: Tensor
    short: Tensor
    long: Tensor


class MemoryLayer(nn.Module):
    """Read, summarise, mix.

    Args:
        host_width: D.
        config: m, h, W and the temperature.
        sizes: S, U, L.
        is_last: the last memory layer makes no summary for a next one.
    """

    def __init__(self, host_width: int, config: ContextConfig, sizes: Sizes, is_last: bool) -> None:
        super().__init__()
        width, n_mixed = config.hidden_size, config.window + sizes.summary
        self.sizes, self.window = sizes, config.window
        self.host_norm, self.down = RMSNorm(host_width), nn.Linear(host_width, width, bias=False)
        self.attention, self.positions = Attention(config), PositionBias(config)
        self.up = nn.Linear(width, host_width, bias=False)
        nn.init.zeros_(self.up.weight)  # the host answers as before until this is trained
        self.feed_forward = FeedForward(width)
        self.has_residual = sizes.short == sizes.summary
        self.to_summary = None if is_last else TokenMixer(n_mixed, sizes.summary, width)
        self.to_short = TokenMixer(n_mixed, sizes.short, width, norm=self.has_residual) if sizes.short else None
        self.to_long = TokenMixer(n_mixed, sizes.long, width, norm=False) if sizes.long else None
        # sigma(0) = 1/2: at the start the two reads count alike
        self.gate = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.25)) if sizes.long else None
        self._begin_with_tokens()

    @torch.no_grad()
    def _begin_with_tokens(self) -> None:
        """Let memory hold tokens before anything is trained: the last S of the window, and the means of L equal parts of it."""
        if self.to_short is not None:
            n_kept = min(self.window, self.sizes.short)
            self.to_short.weight[:, : self.window] = 0.0
            self.to_short.weight[-n_kept:, self.window - n_kept : self.window] = torch.eye(n_kept)
        if self.to_long is not None:
            part = torch.arange(self.window) * self.sizes.long // self.window
            is_member = (part == torch.arange(self.sizes.long)[:, None]).float()
            self.to_long.weight[:, : self.window] = is_member / is_member.sum(1, keepdim=True).clamp_min(1)

    def forward(self, hidden: Tensor, summary: Tensor, short: Tensor, queue: Tensor, schedule: Schedule) -> Passed:
        """Add to the hidden states what memory says, and write memory.

        Args:
            hidden: (B, K, W, D) output of the host's block; fewer than W tokens only where no window completes.
            summary: (B, K, U, m) of the memory layer before.
            short: (B, S, m), this layer's short-term memory before the call.
            queue: (B, N, m), the queue's old entries; not read in a layer without one.
            schedule: masks.
        """
        tokens = self.down(self.host_norm(hidden.to(self.down.weight.dtype)))
        query, key, value = self.attention(tokens)
        bias = self.positions(self.window + self.sizes.summary, self.sizes.short, self.attention.scale)
        asked, own_key, own_value = self.attention(summary)
        shorts, far, onward, long = [], [self._memory(queue)], [], []
        # unbound at once: the backward of an index into all windows would fill all of them for each
        windows = (part.unbind(1) for part in (tokens, key, value, summary, asked, own_key, own_value))
        for k, (x, key_x, value_x, u, query_u, key_u, value_u) in enumerate(zip(*windows, strict=True)):
            short = short.masked_fill(schedule.begins[:, k, None, None], 0.0)
            shorts.append(self._memory(short))
            if schedule.writes:
                near = _joined([shorts[-1], (key_x, value_x), (key_u, value_u)])
                found = self._summarise(query_u, near, bias, _joined(far), schedule, k)
                y = torch.cat([x, self.feed_forward(u + self.attention.out(found))], 1)
                short = torch.where(schedule.is_full[:, k, None, None], self._short(y), short)
                onward.append(self._onward(y))
                if self.to_long is not None:
                    long.append(self.to_long(y))
                    far.append(self._memory(long[-1]))
        read = self._read(query, shorts, _joined(far), bias, schedule)
        none = queue.new_zeros(*hidden.shape[:2], self.sizes.long, queue.shape[2])
        return Passed(
            hidden + self.up(read).to(hidden.dtype), torch.stack(onward, 1) if onward else summary, short,
            torch.stack(long, 1) if long else none,
        )  # fmt: skip

    # --- reading -----------------------------------------------------------------------------------------------

    def _memory(self, x: Tensor) -> Pair:
        """Keys and values (B, h, T, e) of memory (B, T, m), which may have no tokens at all."""
        if x.shape[1]:
            return self.attention.memory(x)
        none = x.new_zeros(len(x), self.attention.n_heads, 0, x.shape[2] // self.attention.n_heads)
        return none, none

    def _summarise(self, query: Tensor, near: Pair, bias: Tensor, far: Pair, schedule: Schedule, k: int) -> Tensor:
        """What the summary tokens of one window find, (B, U, m)."""
        is_memory = torch.arange(bias.shape[-1] - 1, device=query.device) < self.sizes.short
        mask = bias[:, self.window :] + F.pad(_hidden(schedule.is_known[:, k, None] | ~is_memory), (1, 0))[:, None, None]
        found = attend(query, with_sink(near[0]), with_sink(near[1]), mask)
        return self._weigh(found, query, far, schedule.visible[:, k])

    def _read(self, query: Tensor, shorts: list[Pair], far: Pair, bias: Tensor, schedule: Schedule) -> Tensor:
        """What the tokens of all windows find, each in the memory before its window, (B, K, W, m)."""
        batch, n_windows, _, width, _ = query.shape
        key, value = (torch.stack(part, 1).flatten(0, 1) for part in zip(*shorts, strict=True))
        is_unknown = ~schedule.is_known.flatten()[:, None, None, None]
        mask = F.pad(bias[:, :width, 1 : 1 + self.sizes.short].masked_fill(is_unknown, -torch.inf), (1, 0))
        query = query.flatten(0, 1)
        found = attend(query, with_sink(key), with_sink(value), mask)
        if self.gate is not None:
            far = (far[0].repeat_interleave(n_windows, 0), far[1].repeat_interleave(n_windows, 0))
        read = self._weigh(found, query, far, schedule.visible.flatten(0, 1))
        return read.view(batch, n_windows, width, -1)

    def _weigh(self, near: Tensor, query: Tensor, far: Pair, is_seen: Tensor) -> Tensor:
        """Join the read of the short-term memory with one of the queue, where there is a queue; heads are merged."""
        near = self.attention.merge(near)
        if self.gate is None:
            return near
        mask = F.pad(_hidden(is_seen[:, : far[0].shape[2]]), (1, 0))[:, None, None]
        found = self.attention.merge(attend(query, with_sink(far[0]), with_sink(far[1]), mask))
        return found + self.gate.sigmoid() * (near - found)

    # --- mixing, of tokens and summary y (B, W + U, m) ---------------------------------------------------------

    def _onward(self, y: Tensor) -> Tensor:
        """The next layer's summary, (B, U, m)."""
        summary = y[:, self.window :]
        return summary if self.to_summary is None else summary + self.to_summary(y)

    def _short(self, y: Tensor) -> Tensor:
        """The next window's short-term memory, (B, S, m)."""
        if self.to_short is None:
            return y[:, :0]
        mixed: Tensor = self.to_short(y)
        return mixed + y[:, self.window :] if self.has_residual else mixed


def _joined(parts: list[Pair]) -> Pair:
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


def _hidden(is_seen: Tensor) -> Tensor:
    """0 where a key is seen, minus infinity where it is not."""
    return torch.where(is_seen, 0.0, -torch.inf)
