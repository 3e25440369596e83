"""Settings of the models that read long documents through short windows.

All models have one body (RMSNorm, normalised queries and keys, T5 position bias, MLP of four widths) and differ in what they carry from
one window to the next. The names are those of `transformers`, so that `save_pretrained` and `from_pretrained` work as usual.

Axes: W tokens of a window; S short, U summary, L long tokens per window; Q windows kept; N = L Q; d width.
"""

import hashlib
import json
from dataclasses import fields
from inspect import signature
from typing import Any

from transformers import PreTrainedConfig

from remanence.errors import SettingError, nearest

_GATES, _EMPTY = ("static", "token"), ("mask", "zero")
_COMMON = {"model_type", "output_attentions", "attn_implementation", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
"""Keys of `transformers` that stand in a saved file, or that its loaders pass on."""


class ContextConfig(PreTrainedConfig):  # type: ignore[misc]
    """What all models share.

    Args:
        vocab_size: rows of the vocabulary; 257 are the bytes and a token that begins a document.
        hidden_size: d.
        num_hidden_layers: n.
        num_attention_heads: h; divides d.
        window: W, tokens that are read together.
        bos_token_id: the first input of every document.
        initial_temperature: tau at the start: what the product of unit-length queries and keys is multiplied by. The released code begins
            at 1, which leaves attention near uniform for thousands of steps of Adam.
        attend_self: whether a token attends to itself; the released code says no, its content stands on the residual path.
        dropout: on the output of the MLP, while training.

    Raises:
        SettingError: a setting is unknown or out of range, a size is no whole number, the heads do not divide the width, or BOS lies
            outside the vocabulary.
    """

    model_type = "remanence-context"

    def __init__(
        self, vocab_size: int = 257, hidden_size: int = 128, num_hidden_layers: int = 4, num_attention_heads: int = 4, window: int = 64,
        bos_token_id: int | None = None, initial_temperature: float = 8.0, attend_self: bool = False, dropout: float = 0.0, **others: Any,
    ) -> None:  # fmt: skip
        self.vocab_size, self.hidden_size, self.window = vocab_size, hidden_size, window
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.initial_temperature, self.attend_self, self.dropout = initial_temperature, attend_self, dropout
        self._require_known(others)
        super().__init__(bos_token_id=vocab_size - 1 if bos_token_id is None else bos_token_id, **others)
        self._require_counts("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "window")
        self._check()

    def _require_known(self, others: dict[str, Any]) -> None:
        known = {field.name for field in fields(PreTrainedConfig)} | _COMMON
        for key in others:
            if key not in known and not key.startswith("_"):
                ours = [name for kind in type(self).__mro__ if "__init__" in vars(kind) for name in signature(kind).parameters]
                settings = {name for name in ours if name not in ("self", "others", "args", "kwargs")}
                self._refuse(f"there is no setting '{key}'.{nearest(key, settings - known)}")

    def _check(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            self._refuse(f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}")
        if not 0 <= self.bos_token_id < self.vocab_size:
            self._refuse(f"bos_token_id={self.bos_token_id} lies outside the vocabulary of {self.vocab_size}")
        if not self.initial_temperature > 0:
            self._refuse(f"initial_temperature={self.initial_temperature} must be above 0")
        if not 0 <= self.dropout < 1:
            self._refuse(f"dropout={self.dropout} lies outside [0, 1)")

    def _require_counts(self, *names: str, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                self._refuse(f"{name}={value!r} must be {least} or more{'' if isinstance(value, int) else ', and a whole number'}")

    def _require_layer(self, name: str, layer: int) -> None:
        if not 0 <= layer < self.num_hidden_layers:
            self._refuse(f"{name}={layer} is no layer of {self.num_hidden_layers}; they are counted from 0")

    def _refuse(self, what: str) -> None:
        raise SettingError(f"{type(self).__name__}: {what.removesuffix('.')}.")

    @property
    def head_size(self) -> int:
        """e = d / h."""
        return int(self.hidden_size // self.num_attention_heads)

    def fingerprint(self) -> str:
        """Hex digest of what a state depends on: kind of model and all sizes. A state of another one is refused."""
        ours = {key: value for key, value in self.to_dict().items() if key in self._state_settings()}
        return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()[:16]

    def _state_settings(self) -> set[str]:
        return {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "window", "bos_token_id"}


class TransformerXLConfig(ContextConfig):
    """Keys and values of the previous tokens, in every layer.

    Args:
        cache: tokens of the past that a token sees in each layer, exactly; a multiple of the window. 0 is the windowed transformer: nothing
            is carried.
    """

    model_type = "remanence-transformer-xl"

    def __init__(self, cache: int = 64, **others: Any) -> None:
        self.cache = cache
        super().__init__(**others)

    def _check(self) -> None:
        super()._check()
        self._require_counts("cache", least=0)
        if self.cache % self.window:
            self._refuse(f"cache={self.cache} is no multiple of window={self.window}")

    def _state_settings(self) -> set[str]:
        return super()._state_settings() | {"cache"}


class MemorizingConfig(TransformerXLConfig):
    """A long memory of keys and values in one layer; caches as in Transformer-XL in the others.

    Args:
        memory: tokens kept in the memory layer, first in, first out; a multiple of the window.
        memory_layer: counted from 0.
    """

    model_type = "remanence-memorizing-transformer"

    def __init__(self, memory: int = 4096, memory_layer: int = 2, **others: Any) -> None:
        self.memory, self.memory_layer = memory, memory_layer
        super().__init__(**others)

    def _check(self) -> None:
        super()._check()
        self._require_counts("memory")
        self._require_layer("memory_layer", self.memory_layer)
        if self.memory % self.window:
            self._refuse(f"memory={self.memory} is no multiple of window={self.window}")

    def _state_settings(self) -> set[str]:
        return super()._state_settings() | {"memory", "memory_layer"}


class BlockRecurrentConfig(TransformerXLConfig):
    """State vectors in one layer, rewritten after every window; caches as in Transformer-XL in all layers.

    Args:
        states: R, vectors of the state.
        recurrent_layer: counted from 0.
    """

    model_type = "remanence-block-recurrent"

    def __init__(self, states: int = 64, recurrent_layer: int = 2, **others: Any) -> None:
        self.states, self.recurrent_layer = states, recurrent_layer
        super().__init__(**others)

    def _check(self) -> None:
        super()._check()
        self._require_counts("states")
        self._require_layer("recurrent_layer", self.recurrent_layer)

    def _state_settings(self) -> set[str]:
        return super()._state_settings() | {"states", "recurrent_layer"}


class MelodiConfig(ContextConfig):
    """Short-term memory in every layer and a queue of long-term tokens in few.

    Args:
        short: S, short-term tokens of every layer; 0 leaves them out.
        summary: U, summary tokens that read each window; None takes S, or L when S is 0.
        long_per_window: L, tokens that each window adds to the queue; 0 leaves the queue out.
        long_windows: Q, windows kept in the queue; 0 leaves it out.
        long_layers: the layers with a queue, counted from 0; the paper has the middle one.
        gate: how a long layer weighs its two reads: "static" per head and channel (the paper), or "token" from each token (ours).
        empty: whether memory that was never written is masked (ours), or read as zeros (the released code).
        branching: separate mixers for the next layer's summary and for the short-term memory; without it one makes both, and S = U.
        mixer_residual: the mixers' output is added to the layer's summary, for the short-term memory where S = U.
    """

    model_type = "remanence-melodi"

    def __init__(
        self, short: int = 12, summary: int | None = None, long_per_window: int = 8, long_windows: int = 64,
        long_layers: tuple[int, ...] | list[int] = (2,), gate: str = "static", empty: str = "mask", branching: bool = True,
        mixer_residual: bool = True, **others: Any,
    ) -> None:  # fmt: skip
        self.short, self.long_per_window, self.long_windows = short, long_per_window, long_windows
        self.summary = (short or long_per_window) if summary is None else summary
        self.long_layers, self.gate, self.empty = sorted(set(long_layers)), gate, empty
        self.branching, self.mixer_residual = branching, mixer_residual
        super().__init__(**others)

    @property
    def queue(self) -> int:
        """N = L Q, length of a queue."""
        return int(self.long_per_window * self.long_windows) if self.long_layers else 0

    def _check(self) -> None:
        super()._check()
        self._require_counts("short", "summary", "long_per_window", "long_windows", least=0)
        for layer in self.long_layers:
            self._require_layer("long_layers", layer)
        for name, allowed in (("gate", _GATES), ("empty", _EMPTY)):
            if getattr(self, name) not in allowed:
                self._refuse(f"{name}='{getattr(self, name)}' is unknown; choose one of {', '.join(allowed)}")
        if self.summary == 0 and (self.short or self.queue):
            self._refuse("summary=0 writes no memory; give summary tokens, or set short=0 and long_per_window=0")
        if not self.branching and self.short != self.summary:
            self._refuse(f"without branching the short-term memory is the summary: short={self.short} must equal summary={self.summary}")

    def _state_settings(self) -> set[str]:
        return super()._state_settings() | {"short", "summary", "long_per_window", "long_windows", "long_layers"}

    @classmethod
    def meliad(cls, **others: Any) -> "MelodiConfig":
        """The released code's behaviour: empty memory read as zeros, temperature 1, no token attends to itself."""
        return cls(**{"empty": "zero", "initial_temperature": 1.0, "attend_self": False, **others})
