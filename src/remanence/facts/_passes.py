"""The fewest forward passes that yield a causal model's distribution after each of some histories.

A history is the tuple of all ids so far. One pass over a sequence answers for every history that the sequence begins
with, and many sequences that continue one trunk can share the keys and values of that trunk.

Axes: B rows of a batch; T tokens; P positions kept; S spots (histories) read from a batch; V vocabulary.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from remanence.errors import DataError

History = tuple[int, ...]
_Item = TypeVar("_Item")

_WIDER = 4
"""Branches are one or two tokens long, so more of them fit into a pass than trunks do."""


class _Batch(NamedTuple):
    ids: Tensor  # (B, T), padded at the right
    keep: Tensor  # (P,) ascending positions at which logits are wanted
    rows: Tensor  # (S,) which row a spot is read from
    places: Tensor  # (S,) index into `keep`
    parents: Tensor  # (B,) row of the trunk batch that a row continues; empty where it continues none
    branches: "tuple[_Batch, ...]"

    def to(self, device: torch.device) -> "_Batch":
        ids, keep, rows, places, parents = (tensor.to(device) for tensor in self[:5])
        return _Batch(ids, keep, rows, places, parents, tuple(branch.to(device) for branch in self.branches))


class Plan:
    """Which sequences to run, and where in their outputs each history is answered.

    Args:
        histories: each non-empty; repeated ones are read once.
        batch_size: rows of a pass.
        trunks: history -> the longer histories that continue it; given keys and values once, they run as branches.

    Attributes:
        spots: history -> its number, in the order in which `read` yields.
    """

    def __init__(self, histories: Iterable[History], batch_size: int, trunks: Mapping[History, Iterable[History]] | None = None) -> None:
        self.spots: dict[History, int] = {}
        self._placed: dict[torch.device, tuple[_Batch, ...]] = {}
        trunks, taken = _disjoint(trunks or {})
        batches = [self._batch(rows) for rows in _cut(_covers(set(histories) - taken), batch_size)]
        for _, alike in groupby(sorted(trunks, key=lambda head: (len(head), head)), key=len):
            batches += [self._trunk(heads, trunks, batch_size) for heads in _cut(list(alike), batch_size)]
        self._batches = tuple(batches)

    def _trunk(self, heads: list[History], trunks: Mapping[History, set[History]], batch_size: int) -> _Batch:
        batch = self._batch([(head, [head]) for head in heads])
        parent = {head: row for row, head in enumerate(heads)}
        covers = _covers({branch for head in heads for branch in trunks[head]})
        n = len(heads[0])  # of one length, so that no branch continues two of them, and positions follow from the cache
        return batch._replace(
            branches=tuple(self._batch(rows, n, [parent[row[:n]] for row, _ in rows]) for rows in _cut(covers, _WIDER * batch_size))
        )

    def _batch(self, covers: list[tuple[History, list[History]]], skip: int = 0, parents: Sequence[int] = ()) -> _Batch:
        """A batch of (sequence, histories to read from it), without the first `skip` tokens of each."""
        rows, positions = [], []
        for row, (_, histories) in enumerate(covers):
            for history in histories:
                self.spots[history] = len(self.spots)
                rows.append(row)
                positions.append(len(history) - skip - 1)
        keep, places = torch.unique(torch.tensor(positions), return_inverse=True)
        sequences = [sequence[skip:] for sequence, _ in covers]
        width = max(map(len, sequences))
        # Padded at the right, without attention mask: in a causal model no position sees a later one, so what stands
        # behind the last token changes nothing before it and no position shifts. Hence any id will do as padding; the
        # row's own last one needs no pad token and is never outside the vocabulary.
        ids = torch.tensor([sequence + sequence[-1:] * (width - len(sequence)) for sequence in sequences])
        return _Batch(ids, keep, torch.tensor(rows), places, torch.tensor(parents, dtype=torch.int64), ())

    def read(self, model: nn.Module) -> Iterator[Tensor]:
        """Yields (S, V) float32 logits on the model's device; all together one row for each spot, in order.

        Modes and gradients are the caller's business.

        Args:
            model: without wrappers, see `bare`.

        Raises:
            DataError: the model does not answer ids with logits.
        """
        device, accepted = device_of(model), _arguments(model)
        if device not in self._placed:
            self._placed[device] = tuple(batch.to(device) for batch in self._batches)
        for batch in self._placed[device]:
            logits, cache = _run(model, batch, accepted, None)
            yield logits
            for branch in batch.branches:
                yield _run(model, branch, accepted, _taken(cache, branch.parents))[0]


def bare(model: nn.Module) -> nn.Module:
    """The module inside what data-parallel training or `torch.compile` wrapped around it.

    A probe runs on one process; a wrapper would wait there for the others, or compile anew for every shape.
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter lies; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def can_share(model: nn.Module) -> bool:
    """Whether the model takes keys and values computed before."""
    return {"past_key_values", "use_cache"} <= _arguments(model)


def _arguments(model: nn.Module) -> set[str]:
    unwrap = getattr(model, "get_base_model", None)  # peft passes on what it does not know
    inner = unwrap() if callable(unwrap) else model
    return set(inspect.signature(type(inner).forward).parameters)


def _run(model: nn.Module, batch: _Batch, accepted: set[str], cache: Any) -> tuple[Tensor, Any]:
    """(S, V) float32 logits at the spots of a batch, and the keys and values where branches follow."""
    options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
    if "use_cache" in accepted:
        options["use_cache"] = cache is not None or bool(batch.branches)
    n_tokens, positions = batch.ids.shape[1], batch.keep
    if "logits_to_keep" in accepted:
        # logits at few positions instead of all; positions shared by the rows, which every version of transformers takes
        options["logits_to_keep"] = 1 if len(positions) == 1 else positions
        n_tokens, positions = len(positions), torch.arange(len(positions), device=positions.device)
    output = model(batch.ids, **options)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != (len(batch.ids), n_tokens):
        answer = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise DataError(f"the model answers ids {tuple(batch.ids.shape)} with {answer}; a causal language model gives logits (B, T, V).")
    rows, places = (index.to(logits.device) for index in (batch.rows, positions[batch.places]))  # a model may span several devices
    return logits[rows, places].float(), getattr(output, "past_key_values", None)


def _taken(cache: Any, rows: Tensor) -> Any:
    """A cache of these rows; the given one stays as it is (its tensors are replaced, never written)."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(rows)
    return taken


def _covers(histories: set[History]) -> list[tuple[History, list[History]]]:
    """The sequences that no other continues, by length, each with the histories it begins with."""
    covers: list[tuple[History, list[History]]] = []
    for history in sorted(histories, reverse=True):  # what continues a history sorts right behind it
        if covers and covers[-1][0][: len(history)] == history:
            covers[-1][1].append(history)
        else:
            covers.append((history, [history]))
    return sorted(covers, key=lambda cover: (len(cover[0]), cover[0]))


def _disjoint(trunks: Mapping[History, Iterable[History]]) -> tuple[dict[History, set[History]], set[History]]:
    """Trunks with branches such that every history stands once, and the set of them all."""
    taken, found = set(trunks), {}
    for head, branches in trunks.items():
        found[head] = set(branches) - taken
        taken |= found[head]
    return found, taken


def _cut(items: list[_Item], size: int) -> list[list[_Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
