"""What every model that reads documents has, be it trained from nothing or attached to a pretrained host: states, loss, generation.

Axes: B rows (documents); T tokens of a call; W tokens of a window; V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.context._input_checks import require_state, require_tokens
from remanence.context.state import ContextState
from remanence.errors import DataError
from remanence.state import State


class ContextModel(nn.Module):
    """What is common to models that carry a state of bounded size along a document.

    A subclass has a `ContextConfig` as `config`, a `device`, says what its memory is before anything was read (`_empty`), and reads
    (`forward`).
    """

    config: Any
    device: Any
    state_class: ClassVar[type[ContextState]]
    _no_rows: ContextState
    """What states of this model look like; set when the model is made."""

    @abstractmethod
    def _empty(self, batch: int) -> dict[str, Tensor]:
        """The memory's fields before anything was read, in float32 on the default device."""

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

    def _checked(self, tokens: Tensor, state: Any, lengths: Tensor | None, reset: Tensor | None) -> Any:
        require_tokens(tokens, lengths, reset, self.config.vocab_size)
        if state is None:
            return self.init_state(len(tokens))
        require_state(state, self._no_rows, tokens, type(self).__name__)
        return state

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
            with torch.no_grad():
                logits, state = self._go_on(token[:, None], state)

    def _go_on(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read tokens that were just written; the state is nobody else's."""
        return self(tokens, state)  # type: ignore[no-any-return]


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw a token from each row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
