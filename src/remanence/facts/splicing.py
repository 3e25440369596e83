"""A dataset in its final order, with facts spliced in at the scheduled steps.

    data = injector.splice(dataset, batch_size=32, seed=0)
    loader = DataLoader(data, batch_size=32, shuffle=False)
    trainer = Trainer(model, TrainingArguments(..., train_sampling_strategy="sequential"), train_dataset=data)

Item i belongs to step i // batch_size and is row i % batch_size of it, so that every reader who goes through the items
in order sees each fact at its step, and a run that resumes at step k goes on at item k * batch_size. Readers must not
shuffle: `Trainer` does by default, `require_order` tells.

**Several processes.** `batch_size` is the number of items that one optimizer step takes: per-device batch x processes x
accumulation steps. `DistributedSampler(shuffle=False)` deals the items of a step out in turn (row r goes to process
r % processes), `Trainer` and accelerate in blocks (row r goes to process r // per-device batch % processes); either way
each exposure is seen by one process, at its step.

**The end.** Only whole steps are kept: samplers of several processes fill an incomplete one from the beginning of the
data, exposures included. `drop_last` therefore changes nothing. A second epoch would show every fact again: train for
one, on data repeated beforehand (`torch.utils.data.ConcatDataset([dataset] * 3)`) where they are too few.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from remanence.errors import DataError, SettingError
from remanence.facts._rows import ROW_ENTRIES, FactRow, overwrite
from remanence.keys import generator

__all__ = ["SplicedDataset", "require_order"]


class SplicedDataset(Dataset[Any]):
    """What `FactInjector.splice` makes: a map-style dataset, to be read in order; see the module.

    Items are ids (T,), or dicts whose `input_ids`, `labels` and `attention_mask` are tensors (T,), also where the dataset gave
    lists; other entries pass unchanged. An item's value depends on its index alone.

    Args:
        dataset: map-style; items as above.
        batch_size: items of one step.
        placed: index in the new order -> the fact that stands there.
        seed: of the order; None keeps the dataset's own.

    Raises:
        SettingError: `batch_size` is below 1.
        DataError: the dataset has no length or not one whole step; an item is of another type; a fact is longer than the item
            that it should replace.
    """

    def __init__(self, dataset: Any, batch_size: int, placed: Mapping[int, FactRow], seed: int | None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(f"a {type(dataset).__name__} has no length or no items by index; wrap its loader: injector.wrap(loader).")
        if batch_size < 1:
            raise SettingError(f"batch_size: {batch_size} items; give 1 or more.")
        self._dataset, self._placed = dataset, dict(placed)
        self._n_items = len(dataset) // batch_size * batch_size
        if self._n_items == 0:
            raise DataError(f"{len(dataset)} items make no whole step of {batch_size}; give more data or a smaller batch_size.")
        self._order = None if seed is None else torch.randperm(len(dataset), generator=generator(seed, "splice"))
        for index in self._placed:
            if index < self._n_items:
                self[index]  # a fact that is too long is told now, not in the middle of a training

    def __len__(self) -> int:
        return self._n_items

    def __getitem__(self, index: int) -> Any:
        position = range(self._n_items)[index]
        own = position if self._order is None else int(self._order[position])
        item = _as_tensors(self._dataset[own], own)
        fact = self._placed.get(position)
        return item if fact is None else overwrite(item, [(fact, ...)])


def _as_tensors(item: Any, index: int) -> Any:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, Mapping):
        return {name: torch.as_tensor(value) if name in ROW_ENTRIES and value is not None else value for name, value in item.items()}
    raise DataError(f"item {index} of the dataset is a {type(item).__name__}; give dicts with 'input_ids' and 'labels', or tensors of ids.")


def require_order(loader: Any) -> None:
    """Refuse a loader that does not go through its items in order.

    Reads the samplers' types and draws nothing.

    Args:
        loader: a `DataLoader`, also one that accelerate prepared (a callback's `train_dataloader`).

    Raises:
        SettingError: its sampler is neither a `SequentialSampler` nor a `DistributedSampler` with shuffle=False.
    """
    sampler = loader
    while (inner := getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    if isinstance(sampler, SequentialSampler) or (isinstance(sampler, DistributedSampler) and not sampler.shuffle):
        return
    raise SettingError(
        f"the loader draws items by a {type(sampler).__name__}, so that facts would come at other steps than the scheduled ones; "
        f"set shuffle=False (in TrainingArguments: train_sampling_strategy='sequential')."
    )
