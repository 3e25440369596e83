"""Memorizing Transformer: one layer attends to the keys and values of the last N tokens, the others to a Transformer-XL cache.

    model = MemorizingTransformer(MemorizingConfig(memory=4096, memory_layer=2))
    logits, state = model(tokens, model.init_state(batch=2))

The dense form, which is MELODI's baseline: the memory layer takes one softmax over the memory and the tokens of its own document up to the
present one, without positions. Between calls the memory is as the weights of its time made it: between optimizer steps, keys grow stale.

Source: Wu et al. 2022 (arXiv 2203.08913). ours: dense attention in place of the k nearest, first in first out by window, slots that were
never written are masked.

Axes: B rows; K windows of a call; W tokens of a window; N tokens of memory; d width; h heads; e size of a head; n layers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.context._layout import Layout
from remanence.context._ring import NEVER, RingView, committed
from remanence.context.body import FLOOR, Attention, FeedForward, attend, in_a_row, put, with_sink
from remanence.context.configuration import ContextConfig, MemorizingConfig
from remanence.context.language_model import ContextLM
from remanence.context.state import ContextState
from remanence.context.transformer_xl import WindowLayer


@dataclass(frozen=True)
class MemorizingState(ContextState):
    """The caches of all layers but one, and that one's long memory.

    Args:
        keys, values: (B, n - 1, h, C, e), newest at the right.
        memory_keys, memory_values: (B, N / W, h, W, e), a ring: window w stands at w mod N / W.
        memory_window: (B, N / W) int64, which window of the document each place came from; -1 where there is none.
    """

    keys: Tensor
    values: Tensor
    memory_keys: Tensor
    memory_values: Tensor
    memory_window: Tensor


class MemoryLayer(nn.Module):
    """One softmax over long memory and window, then the MLP.

    Args:
        config: a `MemorizingConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.window, self.attend_self = config.window, config.attend_self
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.hidden_size, config.dropout)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, window: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, K, W, d), memory as in `MemorizingState` -> the same after the call."""
        query, key, value = self.attention(x)
        view = RingView(window, layout)
        pairs = (keys, key), (values, value)
        all_keys, all_values = (with_sink(in_a_row(old[:, : view.n_used]), in_a_row(new)) for old, new in pairs)
        reads = []
        for number, each in enumerate(query.unbind(1)):  # window by window, so that the scores of one fit the caches
            bias = self._bias(view.seen(number))
            n_keys = bias.shape[-1]
            reads.append(attend(each, all_keys[:, :, :n_keys], all_values[:, :, :n_keys], bias))
            view.add(number)
        x = self.feed_forward(x + self.attention.out(self.attention.merge(torch.stack(reads, dim=1))))
        new_keys, new_window = committed(keys, window, key, layout)
        return x, new_keys, committed(values, window, value, layout)[0], new_window

    def _bias(self, is_seen: Tensor) -> Tensor:
        """Windows that are seen (B, P) -> (B, 1, W, 1 + P W + W): all of their tokens, and the window's own so far."""
        past = torch.where(is_seen, 0.0, -torch.inf).repeat_interleave(self.window, 1)
        past = nn.functional.pad(past, (1, 0), value=FLOOR)[:, None, None, :].expand(-1, -1, self.window, -1)
        return torch.cat([past, self._own(is_seen.device).expand(len(is_seen), 1, -1, -1)], dim=-1)

    def _own(self, device: torch.device) -> Tensor:
        """(W, W): the causal mask within a window."""
        hidden = torch.ones(self.window, self.window, device=device, dtype=torch.bool).triu(1 if self.attend_self else 0)
        return torch.zeros(self.window, self.window, device=device).masked_fill(hidden, -torch.inf)

    def extend(self, x: Tensor, memory: tuple[Tensor, Tensor], window: Tensor, cache: tuple[Tensor, Tensor], place: Tensor) -> Tensor:
        """A few tokens x (B, t, d) of one window; `memory` holds keys and values (B, h, 1 + N, e) with the sink."""
        query, key, value = self.attention(x)
        put(cache, key, value, place)
        bias = self._bias(window >= 0)[:, 0]
        bias = bias[torch.arange(len(x), device=x.device)[:, None], place][:, None]
        read = attend(query, torch.cat([memory[0], cache[0]], 2), torch.cat([memory[1], cache[1]], 2), bias)
        return self.feed_forward(x + self.attention.out(self.attention.merge(read)))  # type: ignore[no-any-return]


class MemorizingTransformer(ContextLM):
    """Memory of N 2 d floats in one layer, and (n - 1) C 2 d in the others.

    Example:
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "window": 4}
        >>> config = MemorizingConfig(cache=4, memory=12, memory_layer=1, **sizes)
        >>> logits, state = MemorizingTransformer(config)(torch.zeros(1, 10, dtype=torch.int64))
        >>> state.memory_window.tolist(), state.nbytes() == (12 * 2 * 8 + 4 * 2 * 8) * 4
        ([[0, 1, -1]], True)
    """

    config_class: ClassVar[type[ContextConfig]] = MemorizingConfig
    state_class: ClassVar[type[ContextState]] = MemorizingState

    def _build(self, config: Any) -> None:
        are_long = (layer == config.memory_layer for layer in range(config.num_hidden_layers))
        self.layers: Any = nn.ModuleList(MemoryLayer(config) if each else WindowLayer(config, config.cache) for each in are_long)

    def _empty(self, batch: int) -> dict[str, Tensor]:
        config = self.config
        n_heads, size, n_kept = config.num_attention_heads, config.head_size, config.memory // config.window
        keys = torch.zeros(batch, config.num_hidden_layers - 1, n_heads, config.cache, size)
        memory = torch.zeros(batch, n_kept, n_heads, config.window, size)
        window = torch.full((batch, n_kept), NEVER)
        return {"keys": keys, "values": keys, "memory_keys": memory, "memory_values": memory, "memory_window": window}

    def _read(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        memory: dict[str, Tensor] = {}
        for layer in self.layers:
            if isinstance(layer, MemoryLayer):
                long = (field.to(x.dtype) for field in (state.memory_keys, state.memory_values))
                x, *new = layer(x, *long, state.memory_window, layout)
                memory = dict(zip(("memory_keys", "memory_values", "memory_window"), new, strict=True))
            else:
                keys, values = state.keys[:, len(found)].to(x.dtype), state.values[:, len(found)].to(x.dtype)
                x, keys, values = layer(x, keys, values, layout)
                found.append((keys, values))
        caches = {name: getattr(state, name) for name in ("keys", "values")}
        if found:
            caches = dict(zip(caches, (torch.stack(field, dim=1) for field in zip(*found, strict=True)), strict=True))
        return x, caches | memory

    def _derive(self, state: Any) -> dict[str, Tensor]:
        return {
            "memory_keys": with_sink(in_a_row(state.memory_keys.to(self.dtype))),
            "memory_values": with_sink(in_a_row(state.memory_values.to(self.dtype))),
        }

    def _extend(self, x: Tensor, state: Any, cache: dict[str, Tensor], place: Tensor) -> Tensor:
        n_before = 0
        for number, layer in enumerate(self.layers):
            own = cache["keys"][:, number], cache["values"][:, number]
            if isinstance(layer, MemoryLayer):
                x = layer.extend(x, (cache["memory_keys"], cache["memory_values"]), state.memory_window, own, place)
            else:
                keys, values = state.keys[:, n_before].to(x.dtype), state.values[:, n_before].to(x.dtype)
                x, n_before = layer.extend(x, keys, values, state, own, place), n_before + 1
        return x
