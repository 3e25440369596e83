"""A MELODI memory around a pretrained causal language model: long documents through short windows, with the model itself frozen.

    model = load_language_model("folder of a GPT-2, a Llama, ...")
    attached = attach_melodi(model, AttachedMelodiConfig(window=512, lora_rank=8))      # answers as the bare model does, bit for bit
    for progress in ContextTrainer(attached, reader, steps=1000).run(): ...             # trains what was added and nothing else
    logits, state = attached(tokens, state)                                             # the interface of all context models
    attached.save("folder"); attached = load_attached("folder", model)

The host reads windows of W tokens, each from its first position, and sees no other window. Behind chosen blocks a memory layer adds what
earlier windows left: S short-term tokens per layer, rewritten by every window, and in one middle layer a queue with the long-term tokens
of the last Q windows. All of it is m numbers wide, whatever the host's width.

Cost: the host runs all windows of a call in one batch, as it would without memory; only U summary tokens per memory layer go window by
window. `generate` reads the partial window anew for every token, so that any host will do.

Source: Chen et al. 2024, MELODI (arXiv 2410.03156). Attaching it is ours: the paper trains its model from nothing. Low-rank adapters: Hu et
al. 2021 (arXiv 2106.09685), as peft implements them.

Axes: B rows; T tokens of a call; W tokens of a window; V vocabulary; n memory layers; m memory width; S short, U summary, L long tokens per
window; Q windows kept; N = L Q.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.context._attached_call import AttachedCall
from remanence.context._attached_configuration import AttachedMelodiConfig
from remanence.context._attached_host import add_adapter, blocks_of, host_fingerprint, require_host
from remanence.context._attached_layer import MemoryLayer, Sizes
from remanence.context._layout import lay_out
from remanence.context.melodi import MelodiState, nothing_read
from remanence.context.model import ContextModel
from remanence.context.state import ContextState
from remanence.errors import DataError, NonFiniteLoss, StateMismatchError
from remanence.keys import keyed_rng
from remanence.state import all_finite, load_state, save_state

__all__ = ["AttachedMelodi", "AttachedMelodiConfig", "AttachedMelodiState", "attach_melodi", "load_attached"]

_FILE, _FORMAT = "attached.safetensors", "remanence attached melodi"


@dataclass(frozen=True)
class AttachedMelodiState(MelodiState):
    """As MELODI's: m numbers a token, one queue at most."""


class AttachedMelodi(ContextModel):
    """A frozen host with memory layers behind its blocks; `attach_melodi` makes it.

    The host stays in evaluation mode. Called by itself it is the bare model, but for its adapters: the memory layers are hooked in for the
    length of a call.

    Args:
        host: the causal LM.
        config: filled in by `for_host`.
    """

    state_class: ClassVar[type[ContextState]] = AttachedMelodiState

    def __init__(self, host: Any, config: AttachedMelodiConfig) -> None:
        super().__init__()
        self.config, self.host = config, host
        self._blocks = tuple(blocks_of(host)[place] for place in config.layers or ())  # a tuple: they are the host's modules, not ours
        width, places = host.config.get_text_config().hidden_size, config.layers or []
        with keyed_rng(config.seed, "attached memory"):
            self.layers = nn.ModuleList(MemoryLayer(width, config, self._sizes(place), place == places[-1]) for place in places)
            # one set for every window and row
            seeds = nn.init.trunc_normal_(torch.empty(config.summary, config.hidden_size), std=0.25)
        self.summary = nn.Parameter(seeds) if places else None
        self.to(self.device)
        self._no_rows = self.init_state(0, device="cpu")

    def _sizes(self, place: int) -> Sizes:
        has_queue = self.config.queue > 0 and place == self.config.long_layer
        return Sizes(self.config.short, self.config.summary, self.config.long_per_window if has_queue else 0)

    def train(self, mode: bool = True) -> "AttachedMelodi":
        """Training mode for what was added; the host stays in evaluation mode."""
        super().train(mode)
        self.host.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the host lies."""
        device: torch.device = next(self.host.parameters()).device
        return device

    def added(self) -> dict[str, nn.Parameter]:
        """What was added, by name; nothing else is trained."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith("host.") or ".lora_" in name}

    def _empty(self, batch: int) -> dict[str, Tensor]:
        return nothing_read(batch, len(self.layers), 1 if self.config.queue else 0, self.config)

    # --- reading -----------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, state: Any = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, AttachedMelodiState]:
        """Read the next tokens of every row; arguments, results and errors are those of `ContextLM.forward`.

        In a document's first window the answers are the host's own: there is nothing to read yet.
        """
        state = self._checked(tokens, state, lengths, reset)
        if tokens.numel() == 0:
            head: Tensor = self.host.get_output_embeddings().weight
            return head.new_zeros(*tokens.shape, self.config.vocab_size), state
        call = AttachedCall(self.layers, self.summary, lay_out(tokens, state, lengths, reset), state)
        with self._hooked(call):
            logits = self.host(input_ids=call.ids, use_cache=False).logits
        return call.gather(logits), replace(state, cache=None, **call.after())

    @contextmanager
    def _hooked(self, call: AttachedCall) -> Iterator[None]:
        handles = [block.register_forward_hook(partial(call.visit, number)) for number, block in enumerate(self._blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- on disk -----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write what was added, not the host: config.json, and attached.safetensors with a fingerprint of the host's weights.

        Raises:
            NonFiniteLoss: a parameter is NaN or infinite.
        """
        folder, weights = Path(folder).expanduser(), {name: value.detach() for name, value in self.added().items()}
        broken = [name for name, value in weights.items() if not all_finite(value)]
        if broken:
            raise NonFiniteLoss(f"{len(broken)} parameters are NaN or infinite (first three: {broken[:3]}); train anew at a lower rate.")
        self.config.save_pretrained(folder)
        save_state(folder / _FILE, {"format": _FORMAT, "host": host_fingerprint(self.host), "weights": weights})


def attach_melodi(model: Any, config: AttachedMelodiConfig) -> AttachedMelodi:
    """Give a pretrained causal language model a MELODI memory.

    The logits are the bare model's, bit for bit, until something is trained. The model is taken as it is, not copied: its parameters
    are frozen, and with a `lora_rank` adapters are put into it (`model.delete_adapter("melodi")` takes them out again).

    Args:
        model: a decoder-only causal LM of `transformers`, in float32 or bfloat16; what is added is in float32.
        config: sizes.

    Raises:
        SettingError: the model is of another kind, quantised or carries adapters; its blocks cannot be told; windows are longer than its
            positions; or a layer is none of its blocks.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
        >>> sizes = AttachedMelodiConfig(window=4, hidden_size=8, short=2, long_per_window=1, long_windows=3, num_attention_heads=2)
        >>> attached = attach_melodi(model, sizes)
        >>> tokens = torch.arange(4)[None]
        >>> logits, state = attached(tokens)
        >>> torch.equal(logits, model(tokens).logits), state.nbytes()
        (True, 224)
    """
    require_host(model, config.window)
    own = config.for_host(model.config.get_text_config())
    blocks_of(model)
    model.requires_grad_(False)
    if own.lora_rank:
        add_adapter(model, own.lora_rank, own.seed)
    return AttachedMelodi(model, own).train(False)


def load_attached(folder: str | Path, model: Any) -> AttachedMelodi:
    """Attach what `AttachedMelodi.save` wrote to the model it was trained with.

    Raises:
        DataError: the folder holds no attached memory.
        StateMismatchError: it belongs to a model with other weights, or its files do not fit each other.
        SettingError: as in `attach_melodi`.
    """
    folder = Path(folder).expanduser()
    if not (folder / _FILE).exists() or not (folder / "config.json").exists():
        raise DataError(f"{folder} holds no {_FILE} with a config.json; give a folder that AttachedMelodi.save wrote.")
    content = load_state(folder / _FILE)
    if content.get("format") != _FORMAT:
        raise StateMismatchError(f"{folder / _FILE} is no attached memory; it holds {sorted(content)[:5]}. Save it anew.")
    found = host_fingerprint(model)
    if content["host"] != found:
        raise StateMismatchError(f"{folder} was trained with host weights {content['host']}, this model's are {found}; give that host.")
    attached = attach_melodi(model, AttachedMelodiConfig.from_pretrained(folder, local_files_only=True))
    own = {name: tuple(value.shape) for name, value in attached.added().items()}
    saved = {name: tuple(value.shape) for name, value in content["weights"].items()}
    if own != saved:
        differ = sorted(set(own.items()) ^ set(saved.items()))[:3]
        raise StateMismatchError(f"{folder}: config.json does not describe {_FILE} (first: {differ}). Save the memory anew.")
    attached.load_state_dict(content["weights"], strict=False)
    return attached
