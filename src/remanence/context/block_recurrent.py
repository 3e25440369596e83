"""Block-Recurrent Transformer: one layer holds R state vectors that are rewritten after every window.

    model = BlockRecurrentTransformer(BlockRecurrentConfig(states=64, recurrent_layer=2))
    logits, state = model(tokens, model.init_state(batch=2))

In the recurrent layer tokens attend to their window, to a Transformer-XL cache, and across to the state; the state attends to itself and to
the window's tokens, and a fixed gate blends old and new. No MLP stands on the state's path ("fixed:skip", the best published form). Within
a call only the state goes window by window; attention over tokens is computed for all windows at once.

Source: Hutchins et al. 2022 (arXiv 2203.07852), as the authors' code has it.

Axes: B rows; K windows of a call; W tokens of a window; C cached tokens; R state vectors; d width; h heads; e size of a head; n layers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.context._layout import Layout
from remanence.context.body import Attention, RMSNorm, attend, in_a_row, unit
from remanence.context.configuration import BlockRecurrentConfig, ContextConfig
from remanence.context.state import ContextState, spread
from remanence.context.transformer_xl import TransformerXL, TransformerXLState, WindowLayer


@dataclass(frozen=True)
class BlockRecurrentState(TransformerXLState):
    """The caches of all layers, and the state of one.

    Args:
        states: (B, R, d); zeros before the first window is complete, when the learned initial state stands in for it.
    """

    states: Tensor


class RecurrentLayer(WindowLayer):
    """A window layer whose tokens also read a state, and which rewrites the state.

    Args:
        config: a `BlockRecurrentConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config, config.cache)
        width = config.hidden_size
        self.attention = Attention(config, n_reads=2)
        self.across = nn.Linear(width, width, bias=False)
        self.initial = nn.Parameter(torch.randn(config.states, width))
        self.place = nn.Parameter(torch.randn(config.states, width))
        self.state_norm = RMSNorm(width)
        self.state_queries, self.state_memory = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.state_out = nn.Linear(2 * width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(width))

    def recur(self, x: Tensor, keys: Tensor, values: Tensor, states: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        """x (B, K, W, d), cache (B, h, C, e), states (B, R, d) -> the same after the call."""
        query, key, value = self.attention(x)
        all_keys, all_values = (torch.cat([past, in_a_row(new)], dim=2) for past, new in ((keys, key), (values, value)))
        near = self.local(query, all_keys, all_values, layout)
        before = []
        for number, (each_key, each_value) in enumerate(zip(key.unbind(1), value.unbind(1), strict=True)):
            begins = layout.index[:, number] == 0
            states = torch.where(spread(begins, states), self.initial, states)
            before.append(states)
            new = self._rewritten(states, each_key, each_value)
            states = torch.where(spread(layout.is_full[:, number], new), new, states)
        x = self._out(x, near, self._crossed(x, torch.stack(before, dim=1)))
        return x, self._newest(all_keys, layout), self._newest(all_values, layout), states

    def _out(self, x: Tensor, near: Tensor, across: Tensor) -> Tensor:
        read = torch.cat([self.attention.merge(near), self.attention.merge(across)], dim=-1)
        return self.feed_forward(x + self.attention.out(read))  # type: ignore[no-any-return]

    def _crossed(self, x: Tensor, states: Tensor) -> Tensor:
        """What tokens x (..., T, d) read from states (..., R, d), (..., h, T, e)."""
        (query,) = self.attention.heads(self.across(self.attention.norm(x)), 1)
        keys, values = self._memory(self.state_norm(states + self.place))
        return self._attend(query, keys, values)

    def _memory(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.attention.heads(self.state_memory(normed), 2)
        return unit(keys), values

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Nothing is masked: state and complete windows are seen whole."""
        return attend(unit(query) * self.attention.scale, keys, values)

    def _rewritten(self, states: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The state after a window with these keys and values (B, h, W, e)."""
        normed = self.state_norm(states + self.place)
        to_self, to_tokens = self.attention.heads(self.state_queries(normed), 2)
        reads = self._attend(to_self, *self._memory(normed)), self._attend(to_tokens, key, value)
        new: Tensor = self.state_out(torch.cat([self.attention.merge(read) for read in reads], dim=-1))
        return new + self.gate.sigmoid() * (states - new)

    def extend_with(
        self, x: Tensor, keys: Tensor, values: Tensor, state: BlockRecurrentState, cache: tuple[Tensor, Tensor], place: Tensor
    ) -> Tensor:
        """A few tokens x (B, t, d) of one window, whose keys and values are put into `cache`, each (B, h, W, e)."""
        near = self._extended(x, keys, values, state, cache, place)
        begins = state.n_windows == 0
        states = state.states.to(x.dtype)
        return self._out(x, near, self._crossed(x, torch.where(spread(begins, states), self.initial, states)))


class BlockRecurrentTransformer(TransformerXL):
    """Memory of R d floats in one layer, and n C 2 d of caches.

    Example:
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "window": 4}
        >>> config = BlockRecurrentConfig(cache=4, states=3, recurrent_layer=1, **sizes)
        >>> logits, state = BlockRecurrentTransformer(config)(torch.zeros(1, 10, dtype=torch.int64))
        >>> state.nbytes() == (3 * 8 + 2 * 4 * 2 * 8) * 4
        True
    """

    config_class: ClassVar[type[ContextConfig]] = BlockRecurrentConfig
    state_class: ClassVar[type[ContextState]] = BlockRecurrentState

    def _build(self, config: Any) -> None:
        are_recurrent = (layer == config.recurrent_layer for layer in range(config.num_hidden_layers))
        self.layers: Any = nn.ModuleList(RecurrentLayer(config) if each else WindowLayer(config, config.cache) for each in are_recurrent)

    def _empty(self, batch: int) -> dict[str, Tensor]:
        return super()._empty(batch) | {"states": torch.zeros(batch, self.config.states, self.config.hidden_size)}

    def _read(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        found, states = [], state.states
        for layer, keys, values in zip(self.layers, state.keys.to(x.dtype).unbind(1), state.values.to(x.dtype).unbind(1), strict=True):
            if isinstance(layer, RecurrentLayer):
                x, keys, values, states = layer.recur(x, keys, values, states.to(x.dtype), layout)
            else:
                x, keys, values = layer(x, keys, values, layout)
            found.append((keys, values))
        keys, values = (torch.stack(field, dim=1) for field in zip(*found, strict=True))
        return x, {"keys": keys, "values": values, "states": states}

    def _extend(self, x: Tensor, state: Any, cache: dict[str, Tensor], place: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            keys, values = state.keys[:, number].to(x.dtype), state.values[:, number].to(x.dtype)
            extend = layer.extend_with if isinstance(layer, RecurrentLayer) else layer.extend
            x = extend(x, keys, values, state, (cache["keys"][:, number], cache["values"][:, number]), place)
        return x
