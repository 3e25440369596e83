"""Which entries of a change are kept: exact counts, ties by index, by counting instead of sorting.

The bits of a float32 magnitude, read as an integer, have the order of the magnitude. So the k-th largest entry is found by
counting the upper sixteen bits of all entries, then the lower sixteen of those that share the k-th's upper half: exact, O(n),
and a group of tensors (a layer, the whole model) needs no more memory than its largest tensor.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError, nearest

Selection = Literal["ignore_top", "keep_top"] | tuple[Literal["band"], float, float]
Granularity = Literal["tensor", "layer", "global"]
Pair = tuple[Tensor, Tensor]
_Take = Callable[[Tensor], Tensor]

_N_BINS = 1 << 16
_INFINITE = 0x7F800000
_LOWEST = -(1 << 31)
_FIRST_NUMBER = re.compile(r"^.*?(?:^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Rule:
    """What is kept of a change.

    Args:
        select: "ignore_top" restores the largest entries, "keep_top" restores all others, ("band", lo, hi) keeps the entries
            whose rank among |change|, as a share of all entries, lies in [lo, hi).
        fraction: share of the entries that are top, in [0, 1]; a band takes none.
        signed: top are the largest values, not the largest magnitudes.
        granularity: what one ranking covers.

    Raises:
        SettingError: a value is out of its range.
    """

    select: Selection = "ignore_top"
    fraction: float = 0.08
    signed: bool = False
    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        if isinstance(self.select, list):  # what JSON and YAML make of a tuple
            object.__setattr__(self, "select", tuple(self.select))
        if isinstance(self.select, str) and self.select not in ("ignore_top", "keep_top"):
            raise SettingError(f"select={self.select!r} is no selection.{nearest(self.select, ('ignore_top', 'keep_top', 'band'))}")
        if not isinstance(self.select, str):
            self._check_band()
        if not 0 <= self.fraction <= 1:
            raise SettingError(f"fraction={self.fraction} lies outside [0, 1]; 0.08 is eight per cent.")
        if self.granularity not in ("tensor", "layer", "global"):
            raise SettingError(f"granularity={self.granularity!r} is unknown.{nearest(self.granularity, ('tensor', 'layer', 'global'))}")

    def _check_band(self) -> None:
        band: tuple[Any, ...] = tuple(self.select)
        if len(band) != 3 or band[0] != "band" or not 0 <= band[1] <= band[2] <= 1:
            raise SettingError(f"select={band!r} is no band; write ('band', lo, hi) with 0 <= lo <= hi <= 1.")
        if self.signed:
            raise SettingError("signed=True ranks values, a band is a slice of magnitudes; leave one of the two out.")

    @property
    def keeps_all(self) -> bool:
        """Whether every entry keeps its new value, whatever the change is."""
        return (self.select, self.fraction) in (("ignore_top", 0), ("keep_top", 1)) or self._band == (0, 1)

    @property
    def keeps_none(self) -> bool:
        """Whether every entry returns to its old value, whatever the change is."""
        is_empty_band = self._band is not None and self._band[0] == self._band[1]
        return (self.select, self.fraction) in (("ignore_top", 1), ("keep_top", 0)) or is_empty_band

    @property
    def _band(self) -> tuple[float, float] | None:
        return None if isinstance(self.select, str) else (self.select[1], self.select[2])

    def ranks(self, n_entries: int) -> tuple[int, int]:
        """Kept are the ranks [first, second), counted from the largest entry."""
        if self._band is not None:
            low, high = (int(edge * n_entries) for edge in self._band)
            return n_entries - high, n_entries - low
        n_top = int(self.fraction * n_entries)
        return (n_top, n_entries) if self.select == "ignore_top" else (0, n_top)


class Kept(NamedTuple):
    """One tensor before and after the window, and where the new value stays."""

    name: str
    before: Tensor
    after: Tensor
    mask: Tensor

    def merge(self) -> Tensor:
        """The new values where they are kept, the old ones elsewhere; bits are copied, never computed."""
        return torch.where(self.mask, self.after, self.before)


def select_kept(rule: Rule, names: Iterable[str], load: Callable[[str], Pair]) -> Iterator[Kept]:
    """The masks of tensors that `load` fetches by name (before, after), one at a time.

    A tensor is loaded once where it is a ranking of its own, three times within a larger ranking.
    """
    # no tensor is bound to a name here: it would outlive the `yield`, and be in memory beside the next one
    for group in _groups(sorted(names), rule.granularity):
        if rule.keeps_all or rule.keeps_none:
            yield from (_constant(rule, name, *load(name)) for name in group)
        elif len(group) == 1:
            yield _masked(partial(kept_of, rule), rule, group[0], *load(group[0]))
        else:
            yield from _select_together(rule, group, load)


def _select_together(rule: Rule, group: list[str], load: Callable[[str], Pair]) -> Iterator[Kept]:
    inner, outer = _cuts(rule, lambda: (order_keys(change(*load(name)), rule.signed, name) for name in group))
    yield from (_masked(lambda keys: outer(keys) & ~inner(keys), rule, name, *load(name)) for name in group)


def _constant(rule: Rule, name: str, before: Tensor, after: Tensor) -> Kept:
    return Kept(name, before, after, torch.full(after.shape, rule.keeps_all, device=after.device))


def _masked(take: _Take, rule: Rule, name: str, before: Tensor, after: Tensor) -> Kept:
    keys = order_keys(change(before, after), rule.signed, name)
    return Kept(name, before, after, take(keys).view(after.shape))


def kept_of(rule: Rule, keys: Tensor) -> Tensor:
    """(N,) bool: which of these entries are kept."""
    inner, outer = _cuts(rule, lambda: iter([keys]))
    return outer(keys) & ~inner(keys)


def change(before: Tensor, after: Tensor) -> Tensor:
    """after - before in float32; wider types are subtracted before they are rounded."""
    wide = torch.promote_types(after.dtype, torch.float32)
    return (after.to(wide) - before.to(wide)).float()


def order_keys(delta: Tensor, signed: bool, name: str = "") -> Tensor:
    """(N,) int32 with the order of the entries; an unchanged entry gets the lowest key.

    Raises:
        DataError: an entry is NaN or infinite.
    """
    bits = delta.detach().float().contiguous().view(torch.int32).view(-1)
    magnitude = bits & 0x7FFFFFFF
    if magnitude.numel() and int(magnitude.max()) >= _INFINITE:
        bad, whose = int((magnitude >= _INFINITE).sum()), f" of '{name}'" if name else ""
        raise DataError(f"{bad} of {len(bits)} entries of the change{whose} are NaN or infinite; take weights from before the loss broke.")
    if not signed:
        return magnitude
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill_(magnitude == 0, _LOWEST)


def _groups(names: list[str], granularity: Granularity) -> list[list[str]]:
    if granularity == "global":
        return [names] if names else []
    if granularity == "tensor":
        return [[name] for name in names]
    return [list(group) for _, group in groupby(sorted(names, key=lambda name: (layer_of(name), name)), key=layer_of)]


def layer_of(name: str) -> str:
    """The block that a parameter's name places it in: all up to the first number; the name itself where there is none.

    Example:
        >>> layer_of("transformer.h.3.attn.c_attn.weight"), layer_of("score.weight")
        ('transformer.h.3', 'score.weight')
    """
    found = _FIRST_NUMBER.match(name)
    return found.group() if found else name


class _Cut:
    """Takes the entries above a key, and the first `n_ties` that equal it; called on a ranking's tensors in their order."""

    def __init__(self, key: int, n_ties: int) -> None:
        self.key, self.n_ties = key, n_ties

    def __call__(self, keys: Tensor) -> Tensor:
        taken = keys > self.key
        if self.n_ties:
            places = (keys == self.key).nonzero().view(-1)[: self.n_ties]
            taken[places] = True
            self.n_ties -= len(places)
        return taken


def _nothing(keys: Tensor) -> Tensor:
    return torch.zeros_like(keys, dtype=torch.bool)


def _everything(keys: Tensor) -> Tensor:
    return torch.ones_like(keys, dtype=torch.bool)


def _cuts(rule: Rule, all_keys: Callable[[], Iterator[Tensor]]) -> tuple[_Take, _Take]:
    """What lies above the kept ranks, and what lies above their end."""
    coarse = _count((keys >> 16) + _N_BINS // 2 for keys in all_keys())
    n_entries = int(coarse.sum())

    def cut(rank: int) -> _Take:
        if rank == 0:
            return _nothing
        return _everything if rank == n_entries else _find_cut(coarse, rank, all_keys)

    def top(rank: int) -> _Take:
        unchanged = _LOWEST if rule.signed else 0
        found = cut(rank)
        if found is _everything or (isinstance(found, _Cut) and found.key == unchanged):
            return _Cut(unchanged, 0)  # an entry that did not change is never top
        return found

    first, second = rule.ranks(n_entries)
    if rule.select == "ignore_top":
        return top(first), _everything
    return (_nothing, top(second)) if rule.select == "keep_top" else (cut(first), cut(second))


def _find_cut(coarse: Tensor, rank: int, all_keys: Callable[[], Iterator[Tensor]]) -> _Cut:
    upper, left = _descend(coarse, rank)
    upper -= _N_BINS // 2
    lower, left = _descend(_count(keys[keys >> 16 == upper] & 0xFFFF for keys in all_keys()), left)
    return _Cut((upper << 16) + lower, left)


def _count(values: Iterator[Tensor]) -> Tensor:
    total = torch.zeros(_N_BINS, dtype=torch.int64)
    for value in values:
        total += torch.bincount(value, minlength=_N_BINS).cpu()
    return total


def _descend(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th entry from the top, and how many entries of that bin are within the rank."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    bin_ = len(counts) - 1 - place
    return bin_, rank - int(from_top[place] - counts[bin_])
