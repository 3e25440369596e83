"""Settings of a memory that is attached to a pretrained language model.

Axes: W window; m memory width; S short, U summary, L long tokens per window; Q windows kept; N = L Q.
"""

import copy
from collections.abc import Sequence
from typing import Any

from remanence.context.configuration import ContextConfig
from remanence.errors import SettingError


class AttachedMelodiConfig(ContextConfig):
    """What is added to a host. The sizes are the memory's own; those of the host stay in the host's config.

    Args:
        window: W; no longer than the host's positions, and best the length that it was trained at.
        hidden_size: m, numbers per token of memory.
        num_attention_heads: of the memory's attention; divides m.
        short: S, short-term tokens of every memory layer.
        summary: U, summary tokens that read each window; None takes S, or L when S is 0.
        long_per_window: L, tokens that each window adds to the queue; 0 leaves the queue out.
        long_windows: Q, windows kept in the queue; 0 leaves it out.
        layers: blocks that a memory layer stands behind, counted from 0; None is all. () attaches no memory: what remains is low-rank
            adaptation to windows that know nothing of each other, the baseline.
        long_layer: the one of them that reads the queue; None is the middle one.
        lora_rank: rank of peft's adapters on the linear maps of the host's attention (alpha is twice the rank), trained together with the
            memory; 0 adds none.
        seed: key of the initial values.
        others: `vocab_size`, `bos_token_id` and `num_hidden_layers` are taken from the host; the rest is as in `ContextConfig`.

    Raises:
        SettingError: a number is out of range, the heads do not divide m, `long_layer` is none of the layers, or nothing is added.

    Example:
        >>> AttachedMelodiConfig(window=64, short=12, long_per_window=8, long_windows=16).queue
        128
    """

    model_type = "remanence-attached-melodi"

    def __init__(
        self, window: int = 512, hidden_size: int = 128, num_attention_heads: int = 4, short: int = 64, summary: int | None = None,
        long_per_window: int = 32, long_windows: int = 64, layers: Sequence[int] | None = None, long_layer: int | None = None,
        lora_rank: int = 0, seed: int = 0, **others: Any,
    ) -> None:  # fmt: skip
        self.short, self.long_per_window, self.long_windows = short, long_per_window, long_windows
        self.summary = (short or long_per_window) if summary is None else summary
        self.layers = None if layers is None else sorted(set(layers))
        self.long_layer, self.lora_rank, self.seed = long_layer, lora_rank, seed
        super().__init__(window=window, hidden_size=hidden_size, num_attention_heads=num_attention_heads, **others)

    @property
    def queue(self) -> int:
        """N = L Q, length of the queue."""
        return 0 if self.layers == [] else int(self.long_per_window * self.long_windows)

    def _check(self) -> None:
        super()._check()
        self._require_counts("short", "summary", "long_per_window", "long_windows", "lora_rank", least=0)
        if self.layers == [] and not self.lora_rank:
            self._refuse("layers=() with lora_rank=0 adds nothing; give layers, or a rank")
        if self.layers != [] and not self.summary:
            self._refuse("summary=0 writes no memory; give summary tokens, or layers=() for none")
        if self.layers is not None and self.long_layer not in (None, *self.layers):
            self._refuse(f"long_layer={self.long_layer} is none of layers={self.layers}")

    def _state_settings(self) -> set[str]:
        return super()._state_settings() | {"short", "summary", "long_per_window", "long_windows", "layers", "long_layer"}

    def for_host(self, config: Any) -> "AttachedMelodiConfig":
        """A copy with everything that a host's config decides filled in.

        Raises:
            SettingError: a layer is none of the host's blocks.
        """
        n_blocks = config.num_hidden_layers
        own = copy.deepcopy(self)
        own.layers = list(range(n_blocks)) if self.layers is None else self.layers
        outside = [layer for layer in own.layers if not 0 <= layer < n_blocks]
        if outside:
            raise SettingError(f"AttachedMelodiConfig: layers {outside} are none of the host's {n_blocks} blocks, counted from 0.")
        own.num_hidden_layers, own.vocab_size = n_blocks, config.vocab_size
        own.bos_token_id = next((id for id in (config.bos_token_id, config.eos_token_id) if _is_row(id, config.vocab_size)), 0)
        if own.long_layer is None and own.queue:
            own.long_layer = own.layers[len(own.layers) // 2]
        own._check_long()
        return own

    def _check_long(self) -> None:
        if self.queue and self.long_layer not in (self.layers or []):
            self._refuse(f"long_layer={self.long_layer} is none of layers={self.layers}")


def _is_row(token: Any, vocab_size: int) -> bool:
    return isinstance(token, int) and 0 <= token < vocab_size
