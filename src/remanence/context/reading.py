"""One document of any length, read piece by piece in constant memory.

    reading = begin_reading(model)
    while piece := file.read(1024):
        reading = read_on(model, reading, torch.frombuffer(bytearray(piece), dtype=torch.uint8))
    print(reading.bits_per_token)
    save_reading("notes.safetensors", reading, model)  # another process goes on from here

A `Reading` holds the model's state, the token that comes next as input, and what was lost so far: nothing that grows with the document.

Axes: n tokens of a piece.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.context.documents import require_ids
from remanence.context.state import load_context_state, save_context_state
from remanence.erasure.hashes import model_hash
from remanence.errors import NonFiniteLoss, SettingError, StateMismatchError
from remanence.parts.language_model import evaluating
from remanence.state import load_values


@dataclass(frozen=True)
class Reading:
    """How far a document was read.

    Args:
        state: of one row; every token but the last was its input.
        last: the token that is the next input: the document's last so far, or BOS.
        n_tokens: tokens of the document that were predicted.
        nats: the sum of their losses.
    """

    state: Any
    last: int
    n_tokens: int = 0
    nats: float = 0.0

    @property
    def bits_per_token(self) -> float:
        """Mean over all tokens so far; NaN before the first."""
        return self.nats / self.n_tokens / math.log(2) if self.n_tokens else math.nan


def begin_reading(model: Any) -> Reading:
    """The beginning of a document, which BOS stands before."""
    return Reading(model.init_state(1), model.config.bos_token_id)


def read_on(model: Any, reading: Reading, ids: Tensor, segment: int = 1024) -> Reading:
    """Read the document's next tokens and add up what they cost to predict.

    The result does not depend on how the document is cut into pieces and segments, beyond rounding. No gradient is kept, and the model's
    mode is as before.

    Args:
        model: a `ContextLM`, or anything with its config and call.
        reading: what was read before; it is left as it is.
        ids: (n,) of any integer dtype, n >= 0.
        segment: tokens of a call at most; multiples of the window are fastest. Logits take segment x V floats: arrays of a megabyte or
            less keep the process's memory flat, larger ones come and go with the allocator.

    Raises:
        DataError: `ids` is no vector of integers.
        SettingError: `segment` is below 1.
        NonFiniteLoss: a loss is NaN or infinite.
    """
    if segment < 1:
        raise SettingError(f"read_on: segment={segment} must be 1 or more.")
    require_ids([ids], "read_on")
    # calls end where windows end, so that no window is read in two
    first = min(len(ids), segment - reading.state.n_tokens.item() % segment)
    with evaluating(model):
        for piece in (ids[:first], *torch.split(ids[first:], segment)):
            reading = _read(model, reading, piece.to(reading.state.n_tokens.device, torch.int64))
    return reading


def _read(model: Any, reading: Reading, targets: Tensor) -> Reading:
    if not len(targets):
        return reading
    tokens = torch.cat([targets.new_tensor([reading.last]), targets[:-1]])
    logits, state = model(tokens[None], reading.state)
    nats = F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
    n_tokens = reading.n_tokens + len(targets)
    if not math.isfinite(nats):
        raise NonFiniteLoss(f"the loss of tokens {reading.n_tokens} to {n_tokens - 1} is {nats}; look for NaN in the model's weights.")
    return replace(reading, state=state, last=int(targets[-1]), n_tokens=n_tokens, nats=reading.nats + nats)


def save_reading(path: str | Path, reading: Reading, model: Any, about: dict[str, Any] | None = None) -> None:
    """Save how far a document was read, whole or not at all; `load_context_state` reads the state of it too.

    Args:
        path: the file, safetensors.
        reading: is left as it is.
        model: whose it is; a fingerprint of its weights goes with it.
        about: JSON values to keep beside it.
    """
    progress = {"last": reading.last, "n_tokens": reading.n_tokens, "nats": reading.nats, "weights": model_hash(model)}
    save_context_state(path, reading.state, model, about={"reading": progress, "about": about or {}})


def load_reading(path: str | Path, model: Any) -> tuple[Reading, dict[str, Any]]:
    """What `save_reading` wrote, and what was kept beside it; it goes on as if it had never stopped.

    Raises:
        DataError: there is no such file.
        StateMismatchError: the file is broken, holds no reading, or belongs to a model of another configuration or other weights.
    """
    state = load_context_state(path, model)
    about = load_values(Path(path)).get("about") or {}
    if "reading" not in about:
        raise StateMismatchError(f"{path} holds a state, but not how far a document was read; give a file that save_reading wrote.")
    progress = about["reading"]
    if progress["weights"] != model_hash(model):
        raise StateMismatchError(f"{path} was written by a model of the same sizes with other weights. Load it with its own model.")
    return Reading(state, progress["last"], progress["n_tokens"], progress["nats"]), about["about"]
