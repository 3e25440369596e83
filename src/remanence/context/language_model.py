"""The one interface of the models that read long documents: tokens and a state in, logits and a state out.

    model = MelodiLM(MelodiConfig())
    state = model.init_state(batch=2)
    for piece in pieces:                                  # of any length, cut anywhere
        logits, state = model(piece, state)
    for token in model.generate(prompt, state, max_new_tokens=100): ...

A subclass reads whole windows (`_read`), a few tokens of a partial one (`_extend`), and names its state. How a call falls into windows,
what is carried when a window is only partly read, the logits and reading token by token stand here; what all models that read documents
have, one around a pretrained host too, stands in `ContextModel`.

Axes: B rows (documents); T tokens of a call; K windows of a call; W tokens of a window; d width; V vocabulary.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remanence.context._layout import Layout, lay_out
from remanence.context.body import RMSNorm
from remanence.context.configuration import ContextConfig
from remanence.context.model import ContextModel
from remanence.context.state import emptied


class ContextLM(ContextModel, PreTrainedModel):  # type: ignore[misc]
    """A causal language model that carries a state of bounded size along a document.

    Args:
        config: its sizes.
    """

    config_class: ClassVar[type[ContextConfig]] = ContextConfig
    base_model_prefix = "reader"
    main_input_name = "tokens"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self._build(config)
        self.norm = RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._no_rows = self.init_state(0, device="cpu")
        self.post_init()  # type: ignore[operator]

    @abstractmethod
    def _build(self, config: Any) -> None:
        """Make the layers."""

    @abstractmethod
    def _read(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """All layers over the windows of a call: x (B, K, W, d) -> (B, K, W, d), and the memory's fields after it."""

    @abstractmethod
    def _extend(self, x: Tensor, state: Any, cache: dict[str, Tensor], place: Tensor) -> Tensor:
        """All layers over a few tokens of one window.

        Args:
            x: (B, t, d).
            state: as it was when the window began.
            cache: "keys" and "values" (B, n, h, W, e), written in place for the new tokens, and what `_derive` made.
            place: (B, t) int64, where in the window each token stands.
        """

    def _derive(self, state: Any) -> dict[str, Tensor]:
        """What reading the memory needs within one window, computed once."""
        return {}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    # --- reading -----------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, state: Any = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Read the next tokens of every row.

        However a document is cut into calls, the logits are the same to rounding. Within a call gradients reach back through the memory;
        call `state.detach()` between optimizer steps.

        Args:
            tokens: (B, T) int64 ids, any T; a document's first is `config.bos_token_id`.
            state: what the rows have read before; None begins documents.
            lengths: (B,) int64, how many of the T tokens are there; the others are padding. Their logits mean nothing.
            reset: (B, T) bool, tokens that begin a document: nothing from before them is seen.

        Returns:
            Logits (B, T, V) of the token that follows each, and the state after the last.

        Raises:
            DataError: shapes disagree, ids lie outside the vocabulary, or lengths outside 0..T.
        """
        state = self._checked(tokens, state, lengths, reset)
        if tokens.numel() == 0:
            return self._logits(self.embedding(tokens)), state
        hidden, state = self._hidden(tokens, state, lengths, reset)
        return self._logits(hidden), state

    def _hidden(self, tokens: Tensor, state: Any, lengths: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Any]:
        layout = lay_out(tokens, state, lengths, reset)
        state = replace(state, cache=None)
        x, memory = self._read(self.embedding(layout.tokens), state, layout)
        after = layout.advance(state)
        if not layout.is_whole:
            # nothing of an earlier document stays behind where the new one has not yet filled a window
            memory = {name: emptied(value, after["n_windows"] == 0) for name, value in memory.items()}
        memory = {name: value.to(getattr(state, name).dtype) for name, value in memory.items()}
        return layout.gather(x), replace(state, **memory, **after)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    # --- token by token ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Any, in_place: bool = False) -> tuple[Tensor, Any]:
        """Read one token or a few, as `forward` does, without reading the partial window again.

        Args:
            tokens: (B, t) int64.
            state: from any call.
            in_place: write into the passed state's cache instead of a copy; then only the returned state may be used.

        Returns:
            Logits (B, t, V) within 1e-5 of `forward`'s in float32, without gradients, and the state.
        """
        state = self._checked(tokens, state, None, None)
        length = tokens.shape[1]
        if tokens.numel() == 0 or bool((state.n_tail + length >= self.config.window).any()):
            return self(tokens, state)  # type: ignore[no-any-return]
        cache = self._cache_of(state) if state.cache is None else state.cache
        if state.cache is not None and not in_place:
            cache = cache | {name: cache[name].clone() for name in ("keys", "values")}
        place = state.n_tail[:, None] + torch.arange(length, device=tokens.device)
        hidden = self._extend(self.embedding(tokens), state, cache, place)
        tail = state.tail.scatter(1, place, tokens)
        return self._logits(hidden), replace(state, tail=tail, n_tokens=state.n_tokens + length, cache=cache)

    def _cache_of(self, state: Any) -> dict[str, Tensor]:
        """The cache of a state that has none: the tail is read once; what stands beyond it is overwritten before it is seen."""
        config, window = self.config, self.config.window
        shape = (state.batch, config.num_hidden_layers, config.num_attention_heads, window, config.head_size)
        keys = torch.zeros(shape, dtype=self.embedding.weight.dtype, device=self.device)
        cache = {"keys": keys, "values": keys.clone()} | {name: value.to(keys.dtype) for name, value in self._derive(state).items()}
        longest = int(state.n_tail.max()) if state.batch else 0
        if longest:
            place = torch.arange(longest, device=self.device).expand(state.batch, -1)
            self._extend(self.embedding(state.tail[:, :longest]), state, cache, place)
        return cache

    def _go_on(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.step(tokens, state, in_place=True)
