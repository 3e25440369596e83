"""An erasure as a file of its own: the entries it changed, with their old and new values.

    delta = Delta.between(before, after)
    delta.save("delta.safetensors")
    remove_delta(model, delta)                     # the model is `before` again, bit for bit
    apply_delta(model, Delta.load("delta.safetensors"))

Old values are stored because (a + b) - b is not a in floating point.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from remanence.erasure.scope import StateDict, tied_names
from remanence.erasure.sparse import require_same_names
from remanence.errors import StateMismatchError
from remanence.state import load_state, save_state, state_bytes, states_equal

_FORMAT = "remanence delta 1"
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Overwritten(NamedTuple):
    """The n entries of one tensor that changed.

    Args:
        shape: of the whole tensor.
        places: (n,) flat indices, ascending; int32 where they fit.
        old, new: (n,) values in the tensor's dtype.
    """

    shape: tuple[int, ...]
    places: Tensor
    old: Tensor
    new: Tensor


@dataclass(frozen=True)
class Delta:
    """What turns one state into another, entry by entry, and back.

    Args:
        tensors: name -> its changed entries; tensors without any are absent.
        tied: further names of those tensors -> the name they stand under.
    """

    tensors: Mapping[str, Overwritten]
    tied: Mapping[str, str]

    @classmethod
    def between(cls, before: StateDict, after: StateDict) -> "Delta":
        """The delta that leads from `before` to `after`; on the CPU, without a look at the values of unchanged entries.

        An entry counts as changed when its bits did, so that zeros of both signs and NaNs come back as they were.

        Raises:
            StateMismatchError: names, shapes or dtypes differ.

        Example:
            >>> delta = Delta.between({"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 2.0, 0.0])})
            >>> delta.n_entries, delta.size_bytes
            (1, 12)
        """
        require_same_names(before, after)
        tied = tied_names(before, after)
        tensors = {name: _overwritten(name, before[name], after[name]) for name in after if name not in tied}
        changed = {name: entry for name, entry in tensors.items() if len(entry.places)}
        return cls(changed, {name: first for name, first in tied.items() if first in changed})

    @property
    def n_entries(self) -> int:
        """How many entries change."""
        return sum(len(entry.places) for entry in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of places and values; the file adds a header."""
        return state_bytes([list(entry[1:]) for entry in self.tensors.values()])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: entry._asdict() for name, entry in self.tensors.items()}
        save_state(Path(path), {"format": _FORMAT, "tensors": tensors, "tied": dict(self.tied)})

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Read what `save` wrote.

        Raises:
            StateMismatchError: the file is no whole delta.
        """
        saved = load_state(Path(path))
        if saved.get("format") != _FORMAT:
            raise StateMismatchError(f"{path} is a saved state, but no delta (format {saved.get('format')!r}); name a file of Delta.save.")
        tensors = {name: Overwritten(**entry)._replace(shape=tuple(entry["shape"])) for name, entry in saved["tensors"].items()}
        return cls(tensors, saved["tied"])


def _overwritten(name: str, before: Tensor, after: Tensor) -> Overwritten:
    if before.shape != after.shape or before.dtype != after.dtype:
        raise StateMismatchError(
            f"'{name}' is {before.dtype} {tuple(before.shape)} before and {after.dtype} {tuple(after.shape)} after; "
            "a delta leads between states of one model in one dtype."
        )
    old, new = before.detach().cpu().reshape(-1), after.detach().cpu().reshape(-1)
    places = (_bits(old) != _bits(new)).nonzero().view(-1)
    narrow = places.to(torch.int32) if after.numel() < 1 << 31 else places
    return Overwritten(tuple(after.shape), narrow, old[places], new[places])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_WORDS[tensor.element_size()])


def apply_delta(model: nn.Module | StateDict, delta: Delta) -> None:
    """Write the new values of a delta into a model, in place.

    All tensors are checked before the first one is written; entries that the delta does not touch are not looked at.

    Args:
        model: a module, or a state whose tensors are written to; on any device.
        delta: from `Delta.between` or `Delta.load`.

    Raises:
        StateMismatchError: a tensor is absent or of another shape or dtype, or a touched entry is not the delta's old value.
    """
    _write(model, delta, reverse=False)


def remove_delta(model: nn.Module | StateDict, delta: Delta) -> None:
    """Write the old values of a delta back: bit-exact after `apply_delta`.

    Raises:
        StateMismatchError: as in `apply_delta`, a touched entry not being the delta's new value.
    """
    _write(model, delta, reverse=True)


@torch.no_grad()
def _write(model: nn.Module | StateDict, delta: Delta, reverse: bool) -> None:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    names = {**{name: name for name in delta.tensors}, **delta.tied}
    lost = sorted(names.keys() - state.keys())
    if lost:
        raise StateMismatchError(f"{len(lost)} of {len(names)} tensors of the delta are absent from the model (first three: {lost[:3]}).")
    for name, first in names.items():
        _require_fit(name, state[name], delta.tensors[first], reverse)
    for name, first in names.items():
        entry, target = delta.tensors[first], state[name]
        # put_ writes through any stride, where a flat view may not exist
        target.put_(entry.places.to(target.device, torch.int64), (entry.old if reverse else entry.new).to(target.device))


def _require_fit(name: str, target: Tensor, entry: Overwritten, reverse: bool) -> None:
    if tuple(target.shape) != entry.shape or target.dtype != entry.old.dtype:
        raise StateMismatchError(
            f"'{name}' is {target.dtype} {tuple(target.shape)}, the delta is for {entry.old.dtype} {entry.shape}; "
            "use the model, and the dtype, that it was made from."
        )
    expected, other = (entry.new, entry.old) if reverse else (entry.old, entry.new)
    found = target.detach().take(entry.places.to(target.device, torch.int64)).cpu()
    n_wrong = int((_bits(found) != _bits(expected)).sum())
    if n_wrong:
        is_done = states_equal(_bits(found), _bits(other))
        done = "it was removed already" if reverse else "it was applied already"
        told = done if is_done else "the model is another, or was trained since"
        raise StateMismatchError(
            f"{n_wrong} of {len(expected)} entries of '{name}' are not what the delta expects: {told}. Nothing was written."
        )
