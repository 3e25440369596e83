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

from remanence.context.body import Attention, FeedForward, PositionBias, RMSNorm, attend, seen, with_sink
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
        self.token_norm, self.summary_norm = RMSNorm(width), RMSNorm(width)
        self.to_summary = None if is_last else nn.Linear(n_mixed, sizes.summary)
        self.to_short = nn.Linear(n_mixed, sizes.short) if sizes.short else None
        self.to_long = nn.Linear(n_mixed, sizes.long) if sizes.long else None
        # sigma(0) = 1/2: at the start the two reads count alike
        self.gate = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.25)) if sizes.long else None

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
        bias = self.positions(self.window + self.sizes.summary, self.sizes.short, self.attention.temperature)
        queries = self.attention(summary)
        shorts, far = [], [self.attention.memory(queue)]
        onward, long = [], []
        for k in range(hidden.shape[1]):
            short = torch.where(schedule.begins[:, k, None, None], torch.zeros_like(short), short)
            near = self.attention.memory(short)
            shorts.append(near)
            if not schedule.writes:
                continue
            keys = _joined([near, (key[:, k], value[:, k]), (queries[1][:, k], queries[2][:, k])])
            found = self._summarise(queries[0][:, k], keys, bias, _joined(far), schedule, k)
            made = self.feed_forward(summary[:, k] + self.attention.out(found))
            next_summary, new_short, entries = self._mix(tokens[:, k], made)
            short = torch.where(schedule.is_full[:, k, None, None], new_short, short)
            onward.append(next_summary)
            long.append(entries)
            if self.gate is not None:
                far.append(self.attention.memory(entries))
        read = self._read(query, shorts, _joined(far), bias, schedule)
        return Passed(
            hidden + self.up(read).to(hidden.dtype), torch.stack(onward, 1) if onward else summary, short,
            torch.stack(long, 1) if long else queue.new_zeros(*hidden.shape[:2], self.sizes.long, queue.shape[2]),
        )  # fmt: skip

    def _summarise(self, query: Tensor, keys: Pair, bias: Tensor, far: Pair, schedule: Schedule, k: int) -> Tensor:
        """What the summary tokens of one window find, (B, U, m)."""
        is_memory = torch.arange(bias.shape[-1] - 1, device=query.device) < self.sizes.short
        mask = bias[:, self.window :] + seen(schedule.is_known[:, k, None] | ~is_memory)
        found = attend(query, with_sink(keys[0]), with_sink(keys[1]), mask)
        return self._weigh(found, query, far, schedule.visible[:, k])

    def _read(self, query: Tensor, shorts: list[Pair], far: Pair, bias: Tensor, schedule: Schedule) -> Tensor:
        """What the tokens of all windows find, each in the memory before its window, (B, K, W, m)."""
        batch, n_windows, _, width, _ = query.shape
        key, value = (torch.stack(part, 1).flatten(0, 1) for part in zip(*shorts, strict=True))
        is_known = schedule.is_known.flatten()[:, None, None, None]
        mask = F.pad((bias[:, :width, 1 : 1 + self.sizes.short]).masked_fill(~is_known, -torch.inf), (1, 0))
        query = query.flatten(0, 1)
        found = attend(query, with_sink(key), with_sink(value), mask)
        each = (part.repeat_interleave(n_windows, 0) for part in far) if self.gate is not None else far
        read = self._weigh(found, query, tuple(each), schedule.visible.flatten(0, 1))  # type: ignore[arg-type]
        return read.view(batch, n_windows, *read.shape[1:])

    def _weigh(self, near: Tensor, query: Tensor, far: Pair, is_seen: Tensor) -> Tensor:
        """Join the read of the short-term memory with one of the queue, where there is a queue; heads are merged."""
        near = self.attention.merge(near)
        if self.gate is None:
            return near
        mask = F.pad(torch.where(is_seen[:, : far[0].shape[2]], 0.0, -torch.inf), (1, 0))[:, None, None]
        found = self.attention.merge(attend(query, with_sink(far[0]), with_sink(far[1]), mask.expand(-1, -1, query.shape[2], -1)))
        share = self.gate.sigmoid()
        return share * near + (1 - share) * found

    def _mix(self, tokens: Tensor, summary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summary for the next layer (B, U, m), short-term memory (B, S, m) and entries of the queue (B, L, m)."""
        plain = torch.cat([tokens, summary], 1)
        normed = torch.cat([self.token_norm(tokens), self.summary_norm(summary)], 1)
        onward, has_residual = summary, self.sizes.short == self.sizes.summary
        if self.to_summary is not None:
            onward = summary + _over_tokens(self.to_summary, normed)
        short = _over_tokens(self.to_short, normed if has_residual else plain)
        return onward, summary + short if has_residual else short, _over_tokens(self.to_long, plain)


def _over_tokens(mixer: nn.Linear | None, x: Tensor) -> Tensor:
    """A linear map over the tokens of (B, T, m), the same for all channels; no tokens without a mixer."""
    return x[:, :0] if mixer is None else mixer(x.transpose(1, 2)).transpose(1, 2)


def _joined(parts: list[Pair]) -> Pair:
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)
