"""What a model carries from one window of a document to the next: a frozen dataclass of tensors, one row per document.

    state = model.init_state(batch=2)
    logits, state = model(tokens, state)
    first, second = state.split()                      # one state per document
    save_context_state(path, first, model)             # safetensors, with the configuration's fingerprint
    state = ContextState.join([load_context_state(path, model), second])

Nothing else is kept anywhere: no buffers in modules, no global caches, no files. Methods return new states and never write into one.

Axes: B rows; W tokens of a window; n layers; h heads; e size of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from remanence.errors import DataError, StateMismatchError
from remanence.state import State, load_state, save_state

_FORMAT = "remanence context state"


@dataclass(frozen=True)
class ContextState:
    """What every model carries; subclasses add their memory.

    Args:
        n_tokens: (B,) int64, tokens of the current document that were read.
        n_windows: (B,) int64, windows of it that are complete; memory is written when one completes.
        document: (B,) int64, how often the row was reset: which of its documents is being read.
        tail: (B, W) int64, ids of the window that is not yet complete; what lies beyond n_tokens - W n_windows means nothing.
        cache: what `step` keeps so that the next token need not read the tail again: keys and values (B, n, h, W, e) of the tail, and
            those that memory is read by. It can be computed anew, hence is neither saved nor counted as memory.
    """

    n_tokens: Tensor
    n_windows: Tensor
    document: Tensor
    tail: Tensor
    cache: dict[str, Tensor] | None

    @property
    def batch(self) -> int:
        """B."""
        return len(self.n_tokens)

    @property
    def n_tail(self) -> Tensor:
        """(B,) int64: tokens of the window that is not yet complete."""
        return self.n_tokens - self.tail.shape[1] * self.n_windows

    @classmethod
    def memory_fields(cls) -> tuple[str, ...]:
        """Names of the fields that hold memory, the subclass's own."""
        return tuple(field.name for field in fields(cls) if field.name not in _BOOKKEEPING)

    def memory(self) -> dict[str, Tensor]:
        """The memory's tensors by name, each (B, ...)."""
        return {name: getattr(self, name) for name in self.memory_fields()}

    def nbytes(self, kind: str = "stored") -> int:
        """Bytes of memory, of all rows together.

        Args:
            kind: "stored", the floats of the memory as they lie here; "kv", the convention of the papers, which counts a key and a value
                for every token of a long-term memory; "all", every tensor, counters, tail and cache included.

        Raises:
            DataError: there is no such kind.
        """
        if kind == "stored":
            return sum(_bytes(value) for value in self.memory().values() if value.is_floating_point())
        if kind == "kv":
            return self._kv_bytes()
        if kind == "all":
            return sum(_bytes(value) for value in self._tensors().values())
        raise DataError(f"nbytes: kind '{kind}' is unknown; choose one of stored, kv, all.")

    def _kv_bytes(self) -> int:
        return self.nbytes("stored")

    # --- copies ------------------------------------------------------------------------------------------------

    def detach(self) -> Self:
        """The same numbers without a history of gradients; call it between optimizer steps."""
        return self._map(Tensor.detach)

    def fork(self) -> Self:
        """A copy that shares no memory with this one."""
        return self._map(lambda value: value.detach().clone())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """On another device; `dtype` changes the floats only, and drops the cache, which is of the model's dtype.

        Raises:
            DataError: the dtype is none of bfloat16, float32 and float64.
        """
        if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise DataError(f"state: memory in {dtype} leaves its range when it is rewritten window by window; use float32 or bfloat16.")
        kept = self if dtype is None else replace(self, cache=None)
        return kept._map(lambda value: value.to(device, dtype if value.is_floating_point() else value.dtype))

    def index_select(self, rows: Tensor) -> Self:
        """The state of these rows, in this order; `rows` is an index or a mask over B. Rows may repeat (beam search)."""
        return self._map(lambda value: value[rows])

    def split(self) -> list[Self]:
        """A state of one row for every document."""
        return [self._map(lambda value, row=row: value[row : row + 1]) for row in range(self.batch)]  # type: ignore[misc]

    @staticmethod
    def join(states: "Sequence[_S]") -> "_S":
        """The rows of several states as one; the inverse of `split`.

        Raises:
            DataError: there is none, or they belong to different models.
        """
        if not states:
            raise DataError("join: no states were given; give at least one.")
        parts = [replace(state, cache=None) for state in states]
        shapes = [{name: value.shape[1:] for name, value in part._tensors().items()} for part in parts]
        if len({type(part) for part in parts}) > 1 or any(shape != shapes[0] for shape in shapes):
            kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
            raise DataError(f"join: states of different models ({kinds}) have different shapes; join states of one configuration.")
        joined: dict[str, Any] = {name: torch.cat([part._tensors()[name] for part in parts]) for name in shapes[0]}
        return replace(parts[0], **joined)

    def reset(self, rows: Tensor) -> Self:
        """Forget everything in these rows: the next token begins a document there.

        Args:
            rows: (B,) bool mask, or an index of rows.
        """
        mask = torch.zeros(self.batch, dtype=torch.bool, device=self.n_tokens.device)
        mask[rows] = True
        memory = {name: emptied(value, mask) for name, value in self.memory().items()}
        n_tokens, n_windows = self.n_tokens.masked_fill(mask, 0), self.n_windows.masked_fill(mask, 0)
        return replace(self, **memory, n_tokens=n_tokens, n_windows=n_windows, document=self.document + mask, cache=None)

    # --- on disk -----------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """The tensors by name, without the cache; see `remanence.state.save_state`."""
        return replace(self, cache=None)._tensors()

    @classmethod
    def from_state_dict(cls, state: State) -> Self:
        """Inverse of `state_dict`; copies.

        Raises:
            StateMismatchError: fields are missing or unknown.
        """
        names = {field.name for field in fields(cls)} - {"cache"}
        if set(state) != names:
            raise StateMismatchError(f"{cls.__name__} has the fields {sorted(names)}; got {sorted(state)}. Load it with its own model.")
        return cls(**{name: state[name].detach().clone() for name in names}, cache=None)

    # --- every tensor ------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cache"}
        return own | {f"cache.{name}": value for name, value in (self.cache or {}).items()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        own = {field.name: change(getattr(self, field.name)) for field in fields(self) if field.name != "cache"}
        cache = None if self.cache is None else {name: change(value) for name, value in self.cache.items()}
        return replace(self, **own, cache=cache)


_S = TypeVar("_S", bound=ContextState)
_BOOKKEEPING = {field.name for field in fields(ContextState)}


def spread(mask: Tensor, value: Tensor) -> Tensor:
    """A mask (B,) over rows, shaped to meet value (B, ...)."""
    return mask.view(-1, *[1] * (value.dim() - 1))


def emptied(value: Tensor, rows: Tensor) -> Tensor:
    """A field of memory (B, ...) as it is before anything was written, in these rows (B,): zeros, and no window in a ring's numbers."""
    return torch.where(spread(rows, value), 0 if value.is_floating_point() else -1, value)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


class _Model(Protocol):
    config: Any

    def restore_state(self, state: State) -> ContextState: ...


def save_context_state(path: str | Path, state: ContextState, model: _Model, about: dict[str, Any] | None = None) -> None:
    """Save a state to one safetensors file, whole or not at all, with the fingerprint of its model's configuration.

    Args:
        path: the file; its folder is made when absent.
        state: of any number of rows; its cache is left out.
        model: whose state it is.
        about: JSON values to keep beside it under "about", whose state it is for instance; `remanence.state.load_values` reads them alone.
    """
    header = {"format": _FORMAT, "fingerprint": model.config.fingerprint(), "model_type": model.config.model_type}
    save_state(Path(path), header | {"about": about or {}, "state": state.state_dict()})


def load_context_state(path: str | Path, model: _Model) -> Any:
    """Load what `save_context_state` wrote; it continues as if it had never left.

    Raises:
        DataError: there is no such file.
        StateMismatchError: the file is no context state, or was written by a model of another configuration.
    """
    if not Path(path).exists():
        raise DataError(f"there is no file {path}; give a file that save_context_state wrote.")
    content = load_state(Path(path))
    if content.get("format") != _FORMAT:
        raise StateMismatchError(f"{path} is no context state; it holds {sorted(content)[:5]}. Give a file that save_context_state wrote.")
    if content["fingerprint"] != model.config.fingerprint():
        raise StateMismatchError(
            f"{path} belongs to a '{content['model_type']}' with the fingerprint {content['fingerprint']}, this model is a "
            f"'{model.config.model_type}' with {model.config.fingerprint()}; sizes of window or memory differ. Load it with its own model."
        )
    return model.restore_state(content["state"])
