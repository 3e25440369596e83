"""Windows of text as the map-style dataset that DataLoader and transformers.Trainer read.

Axes: N windows; T tokens predicted per window.
"""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from remanence.errors import DataError, SettingError
from remanence.task import Data


class TokenDataset(Dataset[dict[str, Tensor]]):
    """A training run's windows in their seeded order: item i is window i % batch_size of batch i // batch_size.

    The order is that of `Data.rows`, a function of the index alone: it is the same in every process and worker, and a run
    resumes at any position, by `start_step` or by the Trainer's own skipping of batches. Read it without shuffling:
    `DataLoader(dataset, batch_size=batch_size, shuffle=False)`, or
    `TrainingArguments(per_device_train_batch_size=batch_size, train_sampling_strategy="sequential")`.

    Items are `input_ids` (T + 1,) and `labels` (T + 1,), int64: a window with its last target. Labels equal the ids, because
    causal LMs of `transformers` shift them inside; where a window's target is to be ignored, the label is -100.

    Args:
        data: windows, as `windows` makes them.
        batch_size: windows per step.
        seed: key of the order.
        n_steps: steps of the whole run, those before `start_step` included; None makes one pass. A longer run goes on with
            further passes, each in an order of its own.
        start_step: steps done already; item 0 is the first window of this step.

    Raises:
        DataError: there are fewer windows than a batch takes.
        SettingError: `batch_size` is below 1, `start_step` lies outside the run, or a table of one pass is too short for it.

    Example:
        >>> ids = torch.arange(12).view(4, 3)
        >>> dataset = TokenDataset(Data(ids, ids + 1, torch.arange(4)), batch_size=2, seed=0)
        >>> len(dataset), dataset[0]["input_ids"].shape
        (4, torch.Size([4]))
    """

    def __init__(self, data: Data, batch_size: int, seed: int = 0, n_steps: int | None = None, start_step: int = 0) -> None:
        if batch_size < 1:
            raise SettingError(f"batch_size: {batch_size}; give 1 or more.")
        if len(data) < batch_size:
            raise DataError(f"{len(data)} windows fill no batch of {batch_size}; give more text, shorter windows or a smaller batch_size.")
        in_one_pass = data.steps(1, batch_size)
        self.n_steps = in_one_pass if n_steps is None else n_steps
        if not 0 <= start_step <= self.n_steps:
            raise SettingError(f"start_step: {start_step} lies outside the run of {self.n_steps} steps.")
        if data.one_pass and self.n_steps > in_one_pass:
            raise SettingError(f"n_steps: {self.n_steps}, but {len(data)} windows that may be seen once make {in_one_pass} steps.")
        self.data, self.batch_size, self.seed, self.start_step = data, batch_size, seed, start_step

    def __len__(self) -> int:
        end = self.n_steps * self.batch_size
        if self.data.one_pass:
            end = min(end, len(self.data))  # the last batch is cut short
        return max(0, end - self.start_step * self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"the dataset has {len(self)} windows, no window {index}")
        step, place = divmod(position, self.batch_size)
        row = self.data.rows(self.start_step + step, self.batch_size, self.seed, "text")[place]
        inputs, targets = self.data.inputs[row], self.data.targets[row]
        last = targets[-1:] if targets[-1] >= 0 else inputs[-1:]  # nothing follows it, so that any id will do
        labels = torch.where(targets >= 0, targets, -100)
        return {"input_ids": torch.cat([inputs, last]), "labels": torch.cat([inputs[:1], labels])}
