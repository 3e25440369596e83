"""What an attached memory needs of a Hugging Face causal LM: its blocks, adapters in its attention, and a name for its weights."""

import hashlib
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from remanence.errors import SettingError
from remanence.keys import keyed_rng
from remanence.parts.language_model import is_quantised

ADAPTER = "melodi"
"""Name of the low-rank adapter among the host's adapters."""


def require_host(model: Any, window: int) -> None:
    """Refuse what memory cannot be attached to.

    Raises:
        SettingError: it is no causal LM of `transformers`, has an encoder, quantised weights or adapters, or windows are longer than its
            positions.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise SettingError(f"attach_melodi: a {kind} is no causal language model of transformers; give a GPT-2, Llama or the like.")
    if model.config.is_encoder_decoder:
        raise SettingError(f"attach_melodi: a {kind} has an encoder, whose windows are no documents; give a decoder-only model.")
    if is_quantised(model):
        raise SettingError(f"attach_melodi: the weights of this {kind} are quantised; load it in float32 or bfloat16.")
    if getattr(model, "peft_config", None):
        names = ", ".join(model.peft_config)
        raise SettingError(f"attach_melodi: this {kind} carries adapters ({names}); merge them, or give a bare model.")
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if n_positions is not None and window > n_positions:
        raise SettingError(f"attach_melodi: window={window} is longer than the {n_positions} positions of this {kind}; shorten it.")


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal LM: the outermost list of as many modules as its config has layers.

    Raises:
        SettingError: there is none, or more than one at that depth.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == n_layers]
    depth = min((name.count(".") for name, _ in found), default=0)
    outermost = [(name, each) for name, each in found if name.count(".") == depth]
    if len(outermost) != 1:
        names = [name for name, _ in outermost] or "none"
        raise SettingError(
            f"attach_melodi: the blocks of a {type(model).__name__} with {n_layers} layers cannot be told: lists of {n_layers} modules: "
            f"{names}. Give a model that keeps its decoder blocks in one nn.ModuleList."
        )
    return outermost[0][1]


def add_adapter(model: Any, rank: int, seed: int) -> None:
    """Low-rank adapters of peft on every linear map of the blocks' attention; they change nothing until they are trained.

    Raises:
        SettingError: no block has a linear map in a module called attention.
    """
    import peft

    blocks = {id(module) for module in blocks_of(model).modules()}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and id(module) in blocks]
    chosen = [name for name in names if re.search(r"attn|attention", name)]
    if not chosen:
        raise SettingError(
            f"attach_melodi: no linear map in the attention of this {type(model).__name__} (linear: {names[:5]}); give lora_rank=0."
        )
    is_transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in chosen)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=chosen, lora_dropout=0.0, fan_in_fan_out=is_transposed)
    with keyed_rng(seed, "attached adapter"):
        model.add_adapter(config, adapter_name=ADAPTER)


def host_fingerprint(model: Any) -> str:
    """16 hex digits of the sha256 over names and bytes of the host's own weights, adapters apart."""
    own = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if ".lora_" not in name}
    digest = hashlib.sha256()
    for name, value in sorted(own.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
