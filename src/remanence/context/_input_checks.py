"""What a call of a context model may be given; each refusal comes before any work.

Axes: B rows; T tokens of a call.
"""

from typing import Any

import torch
from torch import Tensor

from remanence.context.state import ContextState
from remanence.errors import DataError


def require_tokens(tokens: Tensor, lengths: Tensor | None, reset: Tensor | None, n_words: int) -> None:
    """Ids (B, T) int64 within the vocabulary, lengths (B,) within 0..T, reset (B, T) bool.

    Raises:
        DataError: one of them is not.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise DataError(f"tokens: {tuple(tokens.shape)} of {tokens.dtype}; give ids (B, T) as int64.")
    batch, length = tokens.shape
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < n_words):
        span = f"{int(tokens.min())} to {int(tokens.max())}"
        raise DataError(f"tokens: ids {span}, the vocabulary has 0 to {n_words - 1}; pad with any id and give lengths.")
    if lengths is not None:
        is_count = isinstance(lengths, Tensor) and lengths.dtype == torch.int64 and lengths.shape == (batch,)
        if not is_count or bool(((lengths < 0) | (lengths > length)).any()):
            given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
            raise DataError(f"lengths: {given} for tokens {(batch, length)}; give an int64 for each row, between 0 and {length}.")
    if reset is not None and (reset.shape != tokens.shape or reset.dtype != torch.bool):
        raise DataError(f"reset: {tuple(reset.shape)} of {reset.dtype} for tokens {(batch, length)}; give a bool for each token.")


def require_state(state: Any, empty: ContextState, tokens: Tensor, model: str) -> None:
    """A state of this kind of model, of its sizes, with a row for each of the tokens', on their device.

    Args:
        empty: a state of no rows of the model.
        model: its name.

    Raises:
        DataError: it is none of this.
    """
    batch, window = len(tokens), empty.tail.shape[1]
    shapes = _shapes(empty)
    if type(state) is not type(empty) or state.batch != batch or _shapes(state) != shapes:
        found = f"{state.batch} rows, {_described(_shapes(state))}" if isinstance(state, ContextState) else "no context state"
        raise DataError(
            f"state: a {type(state).__name__} ({found}) for {batch} rows of a {model} with windows of {window} ({_described(shapes)}); "
            f"take it from this model's init_state({batch})."
        )
    if state.n_tokens.device != tokens.device:
        raise DataError(f"state: it lies on {state.n_tokens.device}, the tokens on {tokens.device}; move it with state.to(...).")


def _shapes(state: ContextState) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in (state.memory() | {"tail": state.tail}).items()}


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
