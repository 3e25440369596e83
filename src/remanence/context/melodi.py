"""MELODI: a short-term memory in every layer, rewritten window by window, and one queue of long-term tokens in a middle layer.

    model = MelodiLM(MelodiConfig(window=64, short=12, long_per_window=8, long_windows=64))
    logits, state = model(tokens, model.init_state(batch=2))

Summary tokens u travel behind a window's tokens x through all layers: they see everything, x never sees them. After each layer linear
mixers over the token axis make of [x; u] the next layer's u, the layer's short-term memory z for the next window, and, in a long layer,
the tokens that join the queue. A window costs the same however much was read.

Layer by layer, all windows of a call are projected in one product; only attention, MLP and the mixer of z go window by window, because z of
one window is read by the next.

Source: Chen et al. 2025 (arXiv 2410.03156, ICLR), equations after the authors' code. ours: memory that was never written is masked
(`empty="mask"`), a token may weigh the queue itself (`gate="token"`), any cut of a document into calls.

Axes: B rows; K windows of a call; W tokens, U summary tokens of a window; S short, L long tokens; Q windows in a queue; M long layers;
d width; n layers.
"""

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from remanence.context._layout import Layout
from remanence.context._melodi_layer import Far, MelodiLayer, Queue, queue_bias
from remanence.context._ring import NEVER
from remanence.context.configuration import ContextConfig, MelodiConfig
from remanence.context.language_model import ContextLM
from remanence.context.state import ContextState
from remanence.errors import DataError, SettingError


@dataclass(frozen=True)
class MelodiState(ContextState):
    """Short-term tokens of every layer and the queues of long-term tokens, as embeddings; keys and values are derived from them.

    Args:
        short: (B, n, S, d).
        long: (B, M, Q, L, d), a ring: the tokens of window w stand at w mod Q.
        long_window: (B, Q) int64, which window of the document each place of the ring came from; -1 where there is none. What a slot
            says can so be traced to the text it was written from.
    """

    short: Tensor
    long: Tensor
    long_window: Tensor

    def _kv_bytes(self) -> int:
        return (self.short.numel() + 2 * self.long.numel()) * self.short.element_size()

    def forget(self, windows: Tensor | list[int]) -> Self:
        """Empty the queue's places of these windows of the document.

        Partial: windows that came later were summarised while these could be read, and the short-term memory stays.
        """
        gone = torch.isin(self.long_window, torch.as_tensor(windows, device=self.long_window.device))
        long = self.long.masked_fill(gone[:, None, :, None, None], 0.0)
        return replace(self, long=long, long_window=self.long_window.masked_fill(gone, NEVER), cache=None)


def nothing_read(batch: int, n_layers: int, n_queues: int, config: Any) -> dict[str, Tensor]:
    """The memory's fields of a `MelodiState` before anything was read; sizes of tokens and queues are the configuration's."""
    n_kept = config.long_windows if n_queues else 0
    return {
        "short": torch.zeros(batch, n_layers, config.short, config.hidden_size),
        "long": torch.zeros(batch, n_queues, n_kept, config.long_per_window, config.hidden_size),
        "long_window": torch.full((batch, n_kept), NEVER),
    }


class QueueReads(NamedTuple):
    """What tokens read from the queue.

    Args:
        window: (B, Q) int64, which window of the document each place of the queue came from; -1 where there is none.
        share: (B, t, M, Q), how each long layer's attention to the queue is spread over its places, mean over heads. It sums to 1, or to 0
            where the queue is empty; with `empty="zero"` places that were never written take their part of it.
        weight: (B, t, M), how much the queue counts beside what is read nearby, between 0 and 1, mean over heads and channels.
    """

    window: Tensor
    share: Tensor
    weight: Tensor


class MelodiLM(ContextLM):
    """A causal language model with MELODI's memory; n S d + 2 L Q d floats in the papers' count, n S d + L Q d as stored.

    Args:
        config: sizes; `short=0, long_per_window=0` carries nothing.

    Example:
        >>> config = MelodiConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, window=4, short=2, long_per_window=1,
        ...                       long_windows=3, long_layers=(1,))
        >>> logits, state = MelodiLM(config)(torch.zeros(1, 10, dtype=torch.int64))
        >>> state.long_window.tolist(), state.nbytes("kv") == (2 * 2 * 8 + 2 * 1 * 3 * 8) * 4
        ([[0, 1, -1]], True)
    """

    config_class: ClassVar[type[ContextConfig]] = MelodiConfig
    state_class: ClassVar[type[ContextState]] = MelodiState

    def _build(self, config: Any) -> None:
        n, long = config.num_hidden_layers, config.long_layers if config.queue else []
        self.seeds = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.summary, config.hidden_size), std=0.25))
        self.layers: Any = nn.ModuleList(MelodiLayer(config, layer in long, layer == n - 1) for layer in range(n))
        self.place_of = {layer: place for place, layer in enumerate(long)}

    def resize_window(self, window: int) -> Self:
        """A copy that reads shorter windows: of every mixer what it makes of the window's last tokens is kept.

        Within a document's first window it answers as this model does. Its mixers were trained for longer windows, of which a warning
        reminds: train them again before you trust its memory. States of this model do not fit it.

        Args:
            window: below the model's own; there are no mixers for tokens beyond that.

        Raises:
            SettingError: it is not.
        """
        own = self.config.window
        if not isinstance(window, int) or not 0 < window < own:
            raise SettingError(f"resize_window: window={window} must be 1 to {own - 1}: mixers of windows of {own} can only be cropped.")
        warnings.warn(f"mixers trained for windows of {own} are cropped to {window}; train them again.", stacklevel=2)
        made = copy.deepcopy(self)
        made.config.window = window
        for layer in made.layers:
            layer.window = window
            for mixer in (layer.mix_short, layer.mix_summary, layer.mix_long):
                if mixer is not None:
                    mixer.crop(own - window)
        made._no_rows = made.init_state(0, device="cpu")
        return made

    def _empty(self, batch: int) -> dict[str, Tensor]:
        return nothing_read(batch, self.config.num_hidden_layers, len(self.place_of), self.config)

    def _read(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        y = torch.cat([x, self.seeds.expand(*x.shape[:2], -1, -1)], dim=2)
        shorts, queues = [], []
        for number, layer in enumerate(self.layers):
            queue = None
            if number in self.place_of:
                queue = Queue(layer, state.long[:, self.place_of[number]].to(x.dtype), state.long_window, layout)
                queues.append(queue)
            y, short = layer(y, state.short[:, number].to(x.dtype), queue, layout)
            shorts.append(short)
        memory = {"short": torch.stack(shorts, dim=1), "long": state.long, "long_window": state.long_window}
        if queues:
            rings, windows = zip(*(queue.committed() for queue in queues), strict=True)
            memory |= {"long": torch.stack(rings, dim=1), "long_window": windows[0]}
        return y[:, :, : self.config.window], memory

    def _derive(self, state: Any) -> dict[str, Tensor]:
        found = {}
        for number, layer in enumerate(self.layers):
            short = layer.attention.memory(state.short[:, number].to(self.dtype))
            found[f"short.{number}.keys"], found[f"short.{number}.values"] = short
            if number in self.place_of:
                long = layer.queue_memory(state.long[:, self.place_of[number]].to(self.dtype))
                found[f"long.{number}.keys"], found[f"long.{number}.values"] = long
        return found

    def _extend(
        self, x: Tensor, state: Any, cache: dict[str, Tensor], place: Tensor, reads: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        # of a full ring the oldest window is still seen: it goes when the open window completes
        is_seen = (state.long_window >= 0).repeat_interleave(self.config.long_per_window, 1)
        bias = queue_bias(is_seen, self.config.queue, self.config.empty)
        for number, layer in enumerate(self.layers):
            far = Far(cache[f"long.{number}.keys"], cache[f"long.{number}.values"], bias) if number in self.place_of else None
            if far is not None and reads is not None:
                reads.append(layer.queue_read(x, far, state.long_window.shape[1]))
            past = cache[f"short.{number}.keys"], cache[f"short.{number}.values"]
            x = layer.extend(x, state.n_windows, past, far, (cache["keys"][:, number], cache["values"][:, number]), place)
        return x

    @torch.no_grad()
    def trace(self, tokens: Tensor, state: Any) -> QueueReads:
        """Which windows of the past these tokens read from the queue; the model should be in evaluation mode.

        Args:
            tokens: (B, t) int64, what follows in the open window; no more than fit into it.
            state: what was read before.

        Raises:
            DataError: there are no tokens, or more than the open window has room for.

        Example:
            >>> config = MelodiConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, window=4, short=2, long_per_window=1,
            ...                       long_windows=3, long_layers=(1,))
            >>> model = MelodiLM(config)
            >>> state = model(torch.zeros(1, 8, dtype=torch.int64))[1]
            >>> reads = model.trace(torch.ones(1, 2, dtype=torch.int64), state)
            >>> reads.window.tolist(), tuple(reads.share.shape)
            ([[0, 1, -1]], (1, 2, 1, 3))
        """
        state, length = self._checked(tokens, state, None, None), tokens.shape[1]
        room = self.config.window - int(state.n_tail.max()) if state.batch else self.config.window
        if not 0 < length <= room:
            raise DataError(f"trace: {length} tokens; the open window has room for {room}. Give 1 to {room}, and read window by window.")
        place = state.n_tail[:, None] + torch.arange(length, device=tokens.device)
        reads: list[tuple[Tensor, Tensor]] = []
        self._extend(self.embedding(tokens), state, self._cache_of(state), place, reads)
        if not reads:
            weight = self.embedding.weight.new_zeros(*tokens.shape, 0)
            return QueueReads(state.long_window, weight[..., None][..., :0], weight)
        share, weight = (torch.stack(part, 2) for part in zip(*reads, strict=True))
        return QueueReads(state.long_window, share, weight)
