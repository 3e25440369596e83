"""One layer of MELODI, and the queue that a long layer reads.

Axes: B rows; K windows of a call; W tokens, U summary tokens of a window; S short, L long tokens; Q windows in a queue; P keys of the past;
d width; h heads; e size of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from remanence.context._layout import Layout
from remanence.context._ring import RingView, committed
from remanence.context.body import FLOOR, Attention, FeedForward, PositionBias, RMSNorm, attend, put, seen, with_sink
from remanence.context.state import spread


class TokenMixer(nn.Module):
    """A linear map over the token axis, the same for every channel.

    Args:
        n_in, n_out: tokens.
        width: of the norm before it.
        norm: whether the tokens are normalised first.
    """

    def __init__(self, n_in: int, n_out: int, width: int, norm: bool = True) -> None:
        super().__init__()
        self.norm = RMSNorm(width) if norm else nn.Identity()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * n_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, y: Tensor) -> Tensor:
        """(..., n_in, d) -> (..., n_out, d)."""
        tokens: Tensor = self.norm(y).flatten(0, -3)
        mixed = self.weight.expand(len(tokens), -1, -1) @ tokens  # one matrix for all would transpose and copy the tokens, twice as long
        return mixed.view(*y.shape[:-2], *mixed.shape[1:]) + self.bias[:, None]

    def crop(self, n: int) -> None:
        """Make nothing of the first `n` tokens any more: there will be so many fewer."""
        self.weight = nn.Parameter(self.weight.detach()[:, n:].clone(), self.weight.requires_grad)


class LongGate(nn.Module):
    """How a long layer weighs what it read nearby and from the queue, per head and channel.

    Args:
        config: `gate` "static" is one weight for all tokens, about a half at the start; "token" adds a linear function of the token.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.logit = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.num_attention_heads, 1, config.head_size), std=0.25))
        self.token = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.gate == "token" else None

    def forward(self, near: Tensor, far: Tensor, y: Tensor) -> Tensor:
        """near, far (B, h, T, e), y (B, T, d) the layer's input -> (B, h, T, e)."""
        return far + self.weight(y) * (near - far)

    def weight(self, y: Tensor) -> Tensor:
        """How much the nearby read counts, (B, h, T, e) or (h, 1, e), between 0 and 1; the queue's counts what is left."""
        if self.token is None:
            return self.logit.sigmoid()
        added: Tensor = self.token(y).view(*y.shape[:2], len(self.logit), -1).transpose(1, 2)
        return (self.logit + added).sigmoid()


class Far(NamedTuple):
    """What can be read from a queue: keys and values (B, h, 1 + P, e), the sink first, and the bias (B, 1, 1, 1 + P)."""

    keys: Tensor
    values: Tensor
    bias: Tensor


def queue_bias(is_seen: Tensor, n_all: int, empty: str) -> Tensor:
    """The mask over a queue's tokens, is_seen (B, P), as a bias (B, 1, 1, 1 + P) with the sink.

    With `empty="zero"` the tokens that are missing of `n_all` are read as zeros, as in the released code: so many keys with the logit 0
    and no value weigh as much as a sink with the logarithm of their number.
    """
    bias = seen(is_seen)
    if empty == "zero":
        n_empty = (n_all - is_seen.sum(1)).clamp_min(0)
        bias[:, 0, 0, 0] = torch.where(n_empty > 0, n_empty.log(), FLOOR)
    return bias


class Queue:
    """What a long layer reads during a call: the state's ring, and what the call's own windows have added to it.

    Args:
        layer: the layer whose weights make keys and values.
        ring: (B, Q, L, d).
        window: (B, Q), see `MelodiState`.
        layout: of the call.
    """

    def __init__(self, layer: "MelodiLayer", ring: Tensor, window: Tensor, layout: Layout) -> None:
        self.layer, self.ring, self.windows = layer, ring, window
        self.view, self.n_long = RingView(window, layout), ring.shape[2]
        self.keys, self.values = layer.queue_memory(ring[:, : self.view.n_used])
        self.added: list[Tensor] = []

    def read(self, number: int) -> Far | None:
        """What the call's window `number` sees, exactly the Q windows before it; None when no row sees any."""
        is_seen = self.view.seen(number)
        if self.layer.empty == "mask" and not bool(is_seen.any()):
            return None
        tokens = is_seen.repeat_interleave(self.n_long, 1)
        return Far(self.keys, self.values, queue_bias(tokens, self.view.n_kept * self.n_long, self.layer.empty))

    def add(self, number: int, tokens: Tensor) -> None:
        """The window's long tokens (B, L, d) join."""
        keys, values = self.layer.attention.memory(tokens)
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.view.add(number)
        self.added.append(tokens)

    def committed(self) -> tuple[Tensor, Tensor]:
        """The ring (B, Q, L, d) and its windows (B, Q) after the call."""
        return committed(self.ring, self.windows, torch.stack(self.added, dim=1), self.view.layout)


class MelodiLayer(nn.Module):
    """Attention over short-term memory, tokens and summary; the queue, in a long layer; MLP; mixers.

    Args:
        config: a `MelodiConfig`.
        is_long: whether it reads and writes a queue.
        is_last: then nothing reads its summary.
    """

    def __init__(self, config: Any, is_long: bool, is_last: bool) -> None:
        super().__init__()
        width, n_in = config.hidden_size, config.window + config.summary
        self.window, self.summary, self.short, self.empty = config.window, config.summary, config.short, config.empty
        self.attention, self.position = Attention(config), PositionBias(config)
        self.feed_forward = FeedForward(width, config.dropout)
        is_level = config.short == config.summary
        self.residual, self.short_residual = config.mixer_residual, config.mixer_residual and is_level
        self.mix_short = TokenMixer(n_in, config.short, width, norm=is_level) if config.short else None
        self.mixes_summary = bool(config.summary) and not is_last
        self.mix_summary = TokenMixer(n_in, config.summary, width) if self.mixes_summary and config.branching else None
        self.mix_long = TokenMixer(n_in, config.long_per_window, width, norm=False) if is_long else None
        self.gate = LongGate(config) if is_long else None

    def forward(self, y: Tensor, short: Tensor, queue: Queue | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """Tokens and summary of all windows y (B, K, W + U, d), short (B, S, d) -> the same after the layer."""
        bias = self.bias(y.shape[2])
        done = []
        # unbound at once: the backward of an index into all windows would fill and add all of them for each
        windows = zip(y.unbind(1), *(part.unbind(1) for part in self.attention(y)), strict=True)
        for number, (each, query, key, value) in enumerate(windows):
            short, mask = self._before(short, bias, layout, number)
            near = self.near(query, self.attention.memory(short), (key, value), mask)
            read = near if queue is None else self.far(near, query, each, queue.read(number))
            each = self.feed_forward(each + self.attention.out(self.attention.merge(read)))
            short = self._after(short, each, layout, number)
            if queue is not None and self.mix_long is not None:
                queue.add(number, self.mix_long(each))
            done.append(each)
        return self._summarised(torch.stack(done, dim=1)), short

    def bias(self, n_queries: int) -> Tensor:
        """(h, T, 1 + S + T): distances, the causal mask and the sink."""
        return self.position(n_queries, self.short, self.attention.scale)  # type: ignore[no-any-return]

    def near(self, query: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """Queries (B, h, T, e) over short-term memory and the window itself, keys and values (B, h, P, e) each."""
        keys, values = (with_sink(*pair) for pair in zip(past, own, strict=True))
        return attend(query, keys, values, bias)

    def far(self, near: Tensor, query: Tensor, y: Tensor, far: Far | None) -> Tensor:
        """Weighs what was read nearby (B, h, T, e) against what the queue says; an empty queue says zero."""
        assert self.gate is not None
        said = torch.zeros_like(near) if far is None else attend(query, far.keys, far.values, far.bias)
        return self.gate(near, said, y)  # type: ignore[no-any-return]

    def queue_memory(self, ring: Tensor) -> tuple[Tensor, Tensor]:
        """Ring (B, Q, L, d) -> keys and values (B, h, 1 + Q L, e), made by today's weights: they never grow stale."""
        keys, values = self.attention.memory(ring.flatten(1, 2))
        return with_sink(keys), with_sink(values)

    def queue_read(self, x: Tensor, far: Far, n_places: int) -> tuple[Tensor, Tensor]:
        """Of tokens x (B, t, d): how attention is spread over the ring's places (B, t, Q), and how much the queue counts (B, t)."""
        assert self.gate is not None
        query = self.attention(x)[0]
        spread_over = (query @ far.keys.mT + far.bias).softmax(-1)[..., 1:].mean(1)
        near = self.gate.weight(x).mean((-3, -1)).expand(x.shape[:2])
        return spread_over.unflatten(-1, (n_places, -1)).sum(-1), 1 - near

    def unwritten(self, n_windows: Tensor, n_keys: int) -> Tensor:
        """n_windows (B,) read before -> (B, 1, 1, 1 + P), -inf at the short-term memory of rows that have none."""
        place = torch.arange(n_keys, device=n_windows.device)
        is_short = (place > 0) & (place <= self.short)
        return torch.where(is_short & (n_windows == 0)[:, None], -torch.inf, 0.0)[:, None, None, :]

    def _before(self, short: Tensor, bias: Tensor, layout: Layout, number: int) -> tuple[Tensor, Tensor]:
        """Short-term memory and bias as this window sees them: none in rows whose document begins with it."""
        if not self.short or layout.least_index[number] > 0:
            return short, bias
        index = layout.index[:, number]
        short = torch.where(spread(index > 0, short), short, 0.0)
        return short, bias if self.empty == "zero" else bias + self.unwritten(index, bias.shape[-1])

    def _after(self, short: Tensor, y: Tensor, layout: Layout, number: int) -> Tensor:
        """Short-term memory for the next window; as it was in rows whose window is not complete."""
        if self.mix_short is None:
            return short
        new = self.mix_short(y)
        new = new + y[:, self.window :] if self.short_residual else new
        return new if layout.is_whole else torch.where(spread(layout.is_full[:, number], new), new, short)

    def _summarised(self, y: Tensor) -> Tensor:
        """Tokens go on as they are; the summary becomes the next layer's (B, K, W + U, d)."""
        mixer = self.mix_summary or self.mix_short  # without branching the next layer's summary is the short-term memory
        if not self.mixes_summary or mixer is None:
            return y
        tokens, summary = torch.split(y, [self.window, self.summary], dim=2)
        mixed = mixer(y)
        return torch.cat([tokens, mixed + summary if self.residual else mixed], dim=2)

    def extend(
        self, x: Tensor, n_windows: Tensor, past: tuple[Tensor, Tensor], far: Far | None, cache: tuple[Tensor, Tensor], place: Tensor
    ) -> Tensor:
        """A few tokens x (B, t, d) of one window at `place` (B, t), whose keys and values are put into `cache`, each (B, h, W, e)."""
        query, key, value = self.attention(x)
        put(cache, key, value, place)
        bias = self.bias(self.window)[:, place].movedim(0, 1)
        if self.short and self.empty == "mask":
            bias = bias + self.unwritten(n_windows, bias.shape[-1])
        near = self.near(query, past, cache, bias)
        read = near if self.gate is None else self.far(near, query, x, far)
        return self.feed_forward(x + self.attention.out(self.attention.merge(read)))  # type: ignore[no-any-return]
