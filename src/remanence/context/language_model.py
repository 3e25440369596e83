"""The one interface of the models that read long documents: tokens and a state in, logits and a state out.

    model = MelodiLM(MelodiConfig())
    state = model.init_state(batch=2)
    for piece in pieces:                                  # of any length, cut anywhere
        logits, state = model(piece, state)
    for token in model.generate(prompt, state, max_new_tokens=100): ...

A subclass reads whole windows (`_read`), a few tokens of a partial one (`_extend`), and names its state. Everything else stands here:
how a call falls into windows, what is carried when a window is only partly read, the logits, the loss, and generation.

Axes: B rows (documents); T tokens of a call; K windows of a call; W tokens of a window; d width; V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from remanence.context._input_checks import require_state, require_tokens
from remanence.context._layout import Layout, lay_out
from remanence.context.body import RMSNorm
from remanence.context.configuration import ContextConfig
from remanence.context.state import ContextState, emptied
from remanence.errors import DataError
from remanence.state import State


class ContextLM(PreTrainedModel):  # type: ignore[misc]
    """A causal language model that carries a state of bounded size along a document.

    Args:
        config: its sizes.
    """

    config_class: ClassVar[type[ContextConfig]] = ContextConfig
    base_model_prefix = "reader"
    main_input_name = "tokens"
    _no_split_modules: ClassVar[list[str]] = []
    state_class: ClassVar[type[ContextState]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self._build(config)
        self.norm = RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @abstractmethod
    def _build(self, config: Any) -> None:
        """Make the layers."""

    @abstractmethod
    def _empty(self, batch: int) -> dict[str, Tensor]:
        """The memory's fields before anything was read, in float32 on the default device."""

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

    # --- state -------------------------------------------------------------------------------------------------

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The state of `batch` rows that have read nothing.

        Args:
            batch: B, 0 or more.
            device: the model's own by default.
            dtype: of the memory's floats; float32 or bfloat16, whatever the weights are. It is cast when it is read.

        Raises:
            DataError: `batch` is negative, or the dtype is none of bfloat16, float32 and float64.
        """
        if batch < 0:
            raise DataError(f"init_state: batch={batch}; give 0 rows or more.")
        with torch.device(device or self.device):
            zeros = torch.zeros(batch, dtype=torch.int64)
            tail = torch.zeros(batch, self.config.window, dtype=torch.int64)
            state = self.state_class(**self._empty(batch), n_tokens=zeros, n_windows=zeros, document=zeros, tail=tail, cache=None)
        return state.to(dtype=dtype)

    def restore_state(self, state: State) -> Any:
        """The state whose `state_dict()` this is, on the model's device."""
        return self.state_class.from_state_dict(state).to(self.device)

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

    def loss(
        self, tokens: Tensor, targets: Tensor, state: Any = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Mean nats per target.

        Args:
            tokens, state, lengths, reset: see `forward`.
            targets: (B, T) int64, what follows each token; negative ones, and those of padding, are not counted.

        Raises:
            DataError: as in `forward`, or no target is to be counted.
        """
        n_words = self.config.vocab_size
        if targets.shape != tokens.shape or targets.dtype != torch.int64 or not bool((targets < n_words).all()):
            given = f"{tuple(targets.shape)} of {targets.dtype} for tokens {tuple(tokens.shape)}"
            raise DataError(f"loss: targets {given}; give an int64 id below {n_words} for each token, or a negative one.")
        if lengths is not None and lengths.shape == tokens.shape[:1]:
            targets = targets.masked_fill(torch.arange(tokens.shape[1], device=targets.device) >= lengths[:, None], -1)
        if not bool((targets >= 0).any()):
            raise DataError(f"loss: none of the {targets.numel()} targets is to be counted; give one at least that is 0 or above.")
        logits, state = self(tokens, state, lengths, reset)
        labels = targets.masked_fill(targets < 0, -100).flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100), state

    def _checked(self, tokens: Tensor, state: Any, lengths: Tensor | None, reset: Tensor | None) -> Any:
        require_tokens(tokens, lengths, reset, self.config.vocab_size)
        if state is None:
            return self.init_state(len(tokens))
        require_state(state, self._no_rows, tokens, type(self).__name__)
        return state

    @cached_property
    def _no_rows(self) -> Any:
        return self.init_state(0, device="cpu")

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
        longest = int(state.n_tail.max())
        if longest:
            place = torch.arange(longest, device=self.device).expand(state.batch, -1)
            self._extend(self.embedding(state.tail[:, :longest]), state, cache, place)
        return cache

    def generate(
        self, prompt: Tensor, state: Any = None, max_new_tokens: int = 100, temperature: float = 1.0, top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Go on with a text, token by token, for as long as the caller listens; memory does not grow.

        Args:
            prompt: (B, T) int64, read first; T is 1 or more.
            state: what was read before; it is left as it is.
            max_new_tokens: how many tokens at most.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw among the k most likely only.
            generator: what is drawn from; needed unless `temperature` is 0.

        Yields:
            (B,) int64, the next token of every row.

        Raises:
            DataError: the prompt is empty, `temperature` is negative or `top_k` below 1, or nothing is there to draw from.
        """
        if prompt.dim() != 2 or prompt.shape[1] == 0:
            raise DataError(f"generate: a prompt of shape {tuple(prompt.shape)}; give (B, T) with at least one token, BOS for instance.")
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise DataError(f"generate: temperature={temperature} must be 0 or more, top_k={top_k} 1 or more.")
        if temperature > 0 and generator is None:
            raise DataError("generate: drawing needs a generator=torch.Generator(); temperature=0 draws nothing.")
        return self._generate(prompt, state, max_new_tokens, temperature, top_k, generator)

    def _generate(
        self, prompt: Tensor, state: Any, n_tokens: int, temperature: float, top_k: int | None, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        with torch.no_grad():
            logits, state = self(prompt, state)
        for _ in range(n_tokens):
            token = sample(logits[:, -1], temperature, top_k, generator)
            yield token
            logits, state = self.step(token[:, None], state, in_place=True)


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw a token from each row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]

