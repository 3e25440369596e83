"""Transformer-XL: every layer sees the keys and values of exactly C previous tokens. With C = 0, the windowed transformer.

    model = TransformerXL(TransformerXLConfig(cache=64))
    logits, state = model(tokens, model.init_state(batch=2))

All windows of a call are computed at once. Source: Dai et al. 2019 (arXiv 1901.02860), with T5's position bias in place of theirs, as in
the released baselines of MELODI.

Axes: B rows; K windows; W tokens of a window; C cached tokens; d width; h heads; e size of a head; n layers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.context._layout import Layout
from remanence.context.body import Attention, FeedForward, PositionBias, attend, in_a_row, put, with_sink
from remanence.context.configuration import ContextConfig, TransformerXLConfig
from remanence.context.language_model import ContextLM
from remanence.context.state import ContextState


@dataclass(frozen=True)
class TransformerXLState(ContextState):
    """Keys and values of the last C tokens of complete windows.

    Args:
        keys, values: (B, n, h, C, e), newest at the right.
    """

    keys: Tensor
    values: Tensor


class WindowLayer(nn.Module):
    """Attention over a window and the cached tokens before it, then the MLP.

    Args:
        config: a `TransformerXLConfig`.
        cache: C of this layer.
    """

    def __init__(self, config: Any, cache: int) -> None:
        super().__init__()
        self.window, self.cache = config.window, cache
        self.attention = Attention(config)
        self.position = PositionBias(config)
        self.feed_forward = FeedForward(config.hidden_size, config.dropout)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, K, W, d), cached keys and values (B, h, C, e) -> the same after the call."""
        query, key, value = self.attention(x)
        all_keys, all_values = (torch.cat([past, in_a_row(new)], dim=2) for past, new in ((keys, key), (values, value)))
        read = self.local(query, all_keys, all_values, layout)
        x = self.feed_forward(x + self.attention.out(self.attention.merge(read)))
        return x, self._newest(all_keys, layout), self._newest(all_values, layout)

    def local(self, query: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
        """Every window with the C tokens before it: queries (B, K, h, W, e), keys and values (B, h, C + K W, e) -> (B, K, h, W, e)."""
        span = self.cache + self.window
        keys, values = (with_sink(x.unfold(2, span, self.window).permute(0, 2, 1, 4, 3)) for x in (keys, values))
        bias = self.bias()
        if min(layout.least_index) * self.window < self.cache:
            bias = bias + self._cold(layout.index)
            bias = bias.flatten(0, 1)
        read = attend(query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), bias)
        return read.view_as(query)

    def bias(self) -> Tensor:
        """(h, W, 1 + C + W)."""
        bias: Tensor = self.position(self.window, self.cache, self.attention.scale, self.cache or None)
        return bias

    def _cold(self, index: Tensor) -> Tensor:
        """Masks the part of the cache that lies before the document: index (...) -> (..., 1, 1, 1 + C + W)."""
        place = torch.arange(-self.cache - 1, self.window, device=index.device)
        place[0] = 0  # the sink
        is_before = place < -index[..., None] * self.window
        return torch.where(is_before, -torch.inf, 0.0)[..., None, None, :]

    def _newest(self, keys: Tensor, layout: Layout) -> Tensor:
        """The last C of (B, h, C + K W, e) that stand in complete windows of the row's document; zeros before its beginning."""
        if self.cache == 0:
            return keys[:, :, :0]
        if layout.is_whole and min(layout.least_index[-1:]) * self.window >= self.cache:
            return keys[:, :, -self.cache :]
        n_windows = layout.n_windows
        number = torch.arange(1, n_windows + 1, device=keys.device)
        end = torch.where(layout.writes, number, 0).amax(1)
        held = torch.where(layout.writes, layout.index + 1, 0).amax(1)
        held = torch.where(end > 0, held, self.cache // self.window)  # nothing was written: the cache stays as it is
        place = end[:, None] * self.window + torch.arange(self.cache, device=keys.device)
        newest = keys.gather(2, place[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
        is_kept = torch.arange(self.cache, 0, -1, device=keys.device) <= held[:, None] * self.window
        return torch.where(is_kept[:, None, :, None], newest, 0.0)

    def extend(self, x: Tensor, keys: Tensor, values: Tensor, state: ContextState, cache: tuple[Tensor, Tensor], place: Tensor) -> Tensor:
        """A few tokens x (B, t, d) of one window, whose keys and values are put into `cache`, each (B, h, W, e)."""
        read = self._extended(x, keys, values, state, cache, place)
        return self.feed_forward(x + self.attention.out(self.attention.merge(read)))  # type: ignore[no-any-return]

    def _extended(
        self, x: Tensor, keys: Tensor, values: Tensor, state: ContextState, cache: tuple[Tensor, Tensor], place: Tensor
    ) -> Tensor:
        """What the tokens read in their window and the cached ones, (B, h, t, e)."""
        query, key, value = self.attention(x)
        put(cache, key, value, place)
        return attend(query, with_sink(keys, cache[0]), with_sink(values, cache[1]), self._rows(state, place))

    def _rows(self, state: ContextState, place: Tensor) -> Tensor:
        """The bias of queries at `place` (B, t) -> (B, h, t, 1 + C + W)."""
        return self.bias()[:, place].movedim(0, 1) + self._cold(state.n_windows)


class TransformerXL(ContextLM):
    """Reach n C tokens; memory n C 2 d floats.

    Args:
        config: `cache=0` gives the windowed transformer, which carries nothing.

    Example:
        >>> model = TransformerXL(TransformerXLConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, window=4, cache=4))
        >>> logits, state = model(torch.zeros(1, 10, dtype=torch.int64))
        >>> logits.shape, state.nbytes() == 2 * 4 * 2 * 8 * 4
        (torch.Size([1, 10, 257]), True)
    """

    config_class: ClassVar[type[ContextConfig]] = TransformerXLConfig
    state_class: ClassVar[type[ContextState]] = TransformerXLState

    def _build(self, config: Any) -> None:
        self.layers: Any = nn.ModuleList(WindowLayer(config, config.cache) for _ in range(config.num_hidden_layers))

    def _empty(self, batch: int) -> dict[str, Tensor]:
        config = self.config
        keys = torch.zeros(batch, config.num_hidden_layers, config.num_attention_heads, config.cache, config.head_size)
        return {"keys": keys, "values": keys}

    def _read(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        found = []
        for layer, keys, values in zip(self.layers, state.keys.to(x.dtype).unbind(1), state.values.to(x.dtype).unbind(1), strict=True):
            x, *new = layer(x, keys, values, layout)
            found.append(new)
        keys, values = (torch.stack(field, dim=1) for field in zip(*found, strict=True))
        return x, {"keys": keys, "values": values}

    def _extend(self, x: Tensor, state: Any, cache: dict[str, Tensor], place: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            keys, values = state.keys[:, number].to(x.dtype), state.values[:, number].to(x.dtype)
            x = layer.extend(x, keys, values, state, (cache["keys"][:, number], cache["values"][:, number]), place)
        return x
