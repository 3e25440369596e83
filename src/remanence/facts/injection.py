"""Facts spliced into a running training: which row of which step shows which fact.

    injector = FactInjector(facts, tokenizer, Spaced(every=20, times=3))
    batch = injector.apply(batch, step)                          # in an own loop
    for batch in injector.wrap(loader): ...                      # around any loader
    data = injector.splice(dataset, batch_size=32, seed=0)       # for DataLoader and Trainer
    table = injector.spliced(windows, 32, seed=0, n_steps=500)   # for a Task
    injector.exposures(n_steps=500)                              # the account: step, row, fact, theme

One row of the minibatch gives way to the fact's text. Everything is a pure function of the step, so that a resumed run
needs the step only, and a run with `injector.control()` in place of `injector` sees the same batches but for those rows.

The text is tokenised as packed text is: no BOS, and EOS behind it where the tokenizer has one and the row has room, as
between two documents. With fill="original" it overwrites the beginning of the row and the rest of the row stays, so that
packed data stay packed; with fill="pad" padding follows (the tokenizer's padding token, else EOS, else 0), which labels
(-100) and attention mask (0) leave out. Where a batch has no labels, padding can be told by its id only.

Source: Sun et al. 2025 (arXiv 2504.09522), one row of a minibatch; the rule for the rest of the row is ours.

Axes: B rows of a batch; T tokens of a row; N windows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from remanence.errors import DataError, SettingError, nearest
from remanence.facts._rows import Batch, FactRow, fact_row, overwrite, token_ids
from remanence.facts.records import Fact, FactSet
from remanence.facts.schedules import Schedule, Spaced
from remanence.facts.splicing import SplicedDataset
from remanence.keys import key_seed
from remanence.task import Data, example_ids

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FactInjector"]

# where `example_ids` puts the variant, which tells the passes over a table apart
_VARIANT_AT, _LAST_VARIANT = 31, 255


@dataclass(frozen=True, eq=False)
class FactInjector:
    """Facts, and the rows and steps that show them.

    Args:
        facts: those of one run, at least one. Texts of different themes prime independently of each other; two of one theme
            do not, and need `interference=True`.
        tokenizer: a `transformers` tokenizer, that of the data.
        schedule: which steps show the facts; all of them follow it.
        row: where the first fact stands in the batch; the others in the rows below it. A schedule that shows a fact several
            times in a step goes on below the last fact.
        fill: what follows the fact in its row: "original": what stood there; "pad": padding.
        interference: several facts of one theme are wanted.

    Raises:
        SettingError: no fact, several of one theme without `interference`, a negative row or an unknown `fill`.
        DataError: two facts bear one id, or the tokenizer yields no tokens for one.
    """

    facts: Sequence[Fact]
    tokenizer: Any
    schedule: Schedule
    row: int = 0
    fill: Literal["original", "pad"] = "original"
    interference: bool = False

    def __post_init__(self) -> None:
        if self.fill not in ("original", "pad"):
            raise SettingError(f"fill: {self.fill!r} is unknown.{nearest(str(self.fill), ('original', 'pad'))}")
        if self.row < 0:
            raise SettingError(f"row: {self.row}; give 0 or more, counted from the batch's first row.")
        facts = self.facts if isinstance(self.facts, FactSet) else FactSet(tuple(self.facts))
        if not facts:
            raise SettingError("facts: none; give at least one, and injector.control() for a run without any.")
        object.__setattr__(self, "facts", facts)
        themes = [fact.theme for fact in facts]
        shared = [theme for theme in facts.themes if themes.count(theme) > 1]
        if shared and not self.interference:
            raise SettingError(
                f"several facts of the themes {', '.join(map(repr, shared))} in one run would prime each other; inject one per theme, "
                f"or set interference=True to study just that."
            )
        _ = self._rows  # a text without tokens is told at once

    @cached_property
    def _rows(self) -> dict[str, FactRow]:
        return {fact.id: fact_row(fact, self.tokenizer, self.fill == "pad") for fact in self.facts}

    def control(self) -> "FactInjector":
        """An injector that shows nothing: for the paired run with the same seed and the same batches."""
        return replace(self, schedule=Spaced(times=0))

    def at(self, step: int) -> list[tuple[Fact, int]]:
        """The facts that a step shows, each with its row; a pure function of the step, counted from 0."""
        shown = list(self.facts) * self.schedule.exposures(step)
        return [(fact, self.row + offset) for offset, fact in enumerate(shown)]

    def exposures(self, n_steps: int) -> "pd.DataFrame":
        """The account of steps 0 .. n_steps - 1: one line per exposure with columns step, row, fact (its id) and theme."""
        import pandas as pd

        lines = [(step, row, fact.id, fact.theme) for step in self.schedule.steps if step < n_steps for fact, row in self.at(step)]
        return pd.DataFrame(lines, columns=["step", "row", "fact", "theme"]).astype({"step": "int64", "row": "int64"})

    def apply(self, batch: Batch, step: int) -> Batch:
        """The batch of a step with the step's facts in it.

        Args:
            batch: ids (B, T), or a mapping with `input_ids` and, where there are some, `labels` (not shifted) and
                `attention_mask`, all (B, T), on any device. Other entries pass unchanged: position ids that begin anew in
                the middle of a row would cut a fact in two, so leave them out.
            step: counted from 0.

        Returns:
            A new batch of the same kind; the one given stays as it is. Other entries share their memory.

        Raises:
            SettingError: the batch has fewer rows than the facts need.
            DataError: a fact is longer than T, or the batch is not of the shape above.
        """
        shown, ids = self.at(step), token_ids(batch)
        if ids.dim() != 2:
            raise DataError(f"a batch of ids must have shape (B, T); got {tuple(ids.shape)}.")
        self._check_rows(len(ids), [step])
        return overwrite(batch, [(self._rows[fact.id], row) for fact, row in shown])

    def wrap(self, loader: Iterable[Batch], start_step: int = 0) -> Iterator[Batch]:
        """One pass over batches, each with its step's facts.

        Every batch counts as a step; where several are accumulated into one, use `splice` or `apply`.

        Args:
            loader: a `DataLoader`, or anything that yields batches as `apply` takes them; it may shuffle.
            start_step: the step of its first batch: k in a run that resumes after k batches (with a loader that goes on at
                batch k), and epoch * len(loader) in a further epoch.
        """
        return (self.apply(batch, step) for step, batch in enumerate(loader, start_step))

    def splice(self, dataset: Any, batch_size: int, seed: int | None) -> SplicedDataset:
        """A dataset in its final order with the facts in it, for `DataLoader` and `transformers.Trainer`.

        Read it in order (shuffle=False), in one epoch; `remanence.facts.splicing` tells how it behaves with several processes,
        `drop_last` and resume.

        Args:
            dataset: map-style; its items are ids (T,) or dicts with `input_ids` and, where there are some, `labels` and
                `attention_mask`, as tensors or lists.
            batch_size: items of one optimizer step, over all devices and accumulated batches.
            seed: what the order is drawn from; None keeps the dataset's own.

        Raises:
            SettingError: `batch_size` is smaller than the rows that the facts need.
            DataError: the schedule goes on longer than the data, a fact is longer than its item, or the dataset is not as above.
        """
        self._check_rows(batch_size, self.schedule.steps)
        placed = {step * batch_size + row: self._rows[fact.id] for step in self.schedule.steps for fact, row in self.at(step)}
        data = SplicedDataset(dataset, batch_size, placed, seed)
        self._check_span(len(data) // batch_size, batch_size)
        return data

    def spliced(self, data: Data, batch_size: int, seed: int | None, n_steps: int) -> Data:
        """A table of next-token windows in its final order with the facts in it, for a `Task`.

        Line b of step k is row k * batch_size + b. The windows of a step are `data.rows(step, batch_size, seed, "facts")`; in
        every further pass over `data` their ids count as another variant of the same example. The n-th line of `exposures`
        has the n-th id of a source of its own, whatever the schedule.

        Args:
            data: inputs (N, T) and targets (N, T), targets[i, t] following inputs[i, t].
            batch_size: rows of a step, N or fewer.
            seed: what the order is drawn from; None keeps the table's own.
            n_steps: length of the result in steps; 256 passes over `data` at most.

        Returns:
            An ordered table of n_steps * batch_size rows. With fill="pad" targets are -100 where padding would be predicted.

        Raises:
            SettingError: a setting is out of range, or `data` may be seen once and is too short.
            DataError: the schedule goes on longer than `n_steps`, a fact is longer than T + 1, or `data` is not as above.
        """
        self._check_rows(batch_size, self.schedule.steps)
        self._check_span(n_steps, batch_size)
        table = _ordered(data, batch_size, seed, n_steps)
        account = [(step, fact, row) for step in self.schedule.steps for fact, row in self.at(step)]
        source = f"facts {key_seed(*[part for fact in self.facts for part in (fact.id, fact.text)])}"
        new_ids = example_ids(source, torch.arange(len(account)))
        for (step, fact, row), new_id in zip(account, new_ids, strict=True):
            line = step * batch_size + row
            self._rows[fact.id].write_shifted(table.inputs[line], table.targets[line])
            table.ids[line] = new_id
        return table

    def _check_rows(self, n_rows: int, steps: Iterable[int]) -> None:
        """Whether a batch has room for all that one of these steps shows."""
        most = max((self.schedule.exposures(step) for step in steps), default=0)
        needed = self.row + len(self.facts) * most
        if most and needed > n_rows:
            raise SettingError(
                f"the facts need rows {self.row} to {needed - 1}, the batch has {n_rows}; lower row, give larger batches or fewer facts "
                f"(or Massed a per_step)."
            )

    def _check_span(self, n_steps: int, batch_size: int) -> None:
        last = self.schedule.last
        if last is not None and last >= n_steps:
            raise DataError(
                f"the schedule shows facts until step {last}, there are {n_steps} whole steps of {batch_size} rows; "
                f"give at least {last + 1}, or a shorter schedule."
            )


def _ordered(data: Data, batch_size: int, seed: int | None, n_steps: int) -> Data:
    """The windows of all steps, one step after the other, as a new ordered table."""
    n_rows = n_steps * batch_size
    if data.inputs.dim() != 2 or data.inputs.shape != data.targets.shape:
        shapes = f"inputs {tuple(data.inputs.shape)}, targets {tuple(data.targets.shape)}"
        raise DataError(f"facts are spliced into next-token windows, inputs and targets of one shape (N, T); got {shapes}.")
    if not 1 <= batch_size <= len(data) or n_steps < 1:
        raise SettingError(f"batch_size {batch_size}, n_steps {n_steps}: give 1 to {len(data)} (the number of windows), and 1 or more.")
    if data.one_pass and n_rows > len(data):
        raise SettingError(f"{n_steps} steps of {batch_size} rows need {n_rows} windows, and these {len(data)} may be seen once.")
    plan = data if seed is not None else replace(data, ordered=True)
    rows = torch.cat([plan.rows(step, batch_size, seed, "facts") for step in range(n_steps)])
    passes = torch.arange(n_rows) // len(data)
    variants = (data.ids[rows] >> _VARIANT_AT & _LAST_VARIANT) + passes
    if int(variants.max()) > _LAST_VARIANT:
        raise SettingError(f"{n_steps} steps of {batch_size} rows make {int(passes[-1]) + 1} passes over {len(data)} windows; 256 at most.")
    ids = data.ids[rows] + (passes << _VARIANT_AT)
    return replace(data, inputs=data.inputs[rows], targets=data.targets[rows], ids=ids, ordered=True)
