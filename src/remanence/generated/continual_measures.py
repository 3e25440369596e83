"""What a sequence of tasks did to accuracy, and what it did to the memory behind it.

    table = accuracy_table(model.unroll(sequence), continual_targets(sequence)).mean(0)
    found = sequence_measures(table.numpy())

Where the classes of all tasks compete, accuracy falls because there are more of them, even for a perfect memory. The *oracle* keeps the
weights of every task: its table holds the accuracy on task i under the weights of task i, among the classes known after task t. What it
loses is the growing choice; what is lost beyond that, the mechanism forgot.

Axes: T tasks; B sequences; `table[t, i]` accuracy on task i after task t, above the diagonal nothing is read.

Source: Chaudhry et al. 2018, Lopez-Paz and Ranzato 2017, through `remanence.probes.metrics`. ours: the oracle's drop, the drift.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from remanence.errors import DataError
from remanence.generated._continual_classes import columns, repeats
from remanence.generated.continual_state import ContinualState
from remanence.generated.episode import Episode
from remanence.generated.heads import class_means
from remanence.probes.metrics import Mask, Result, Values, average_accuracy, backward_transfer, forgetting_first, forgetting_max

if TYPE_CHECKING:
    from remanence.generated.continual import ContinualHyperTransformer


class SequenceMeasures(NamedTuple):
    """Measures of one table; NaN comes with the reason.

    Args:
        accuracy: mean over tasks after the last one.
        forgetting: mean over the earlier tasks of their best accuracy before the last task, minus the final one.
        backward_transfer: mean over the earlier tasks of the final accuracy minus that right after the task.
    """

    accuracy: Result
    forgetting: Result
    backward_transfer: Result


def sequence_measures(table: Values) -> SequenceMeasures:
    """Final accuracy, forgetting and backward transfer of a (T, T) table.

    Raises:
        DataError: the table is not square.

    Example:
        >>> found = sequence_measures(np.array([[0.9, np.nan], [0.5, 0.8]]))
        >>> [round(result.value, 6) for result in found]
        [0.65, 0.4, -0.4]
    """
    values, learned = _square(table)
    return SequenceMeasures(average_accuracy(values, learned), forgetting_max(values, learned), backward_transfer(values, learned))


def oracle_drop(oracle: Values) -> Result:
    """What the growing choice costs alone: mean over the earlier tasks of the oracle's accuracy right after the task minus its final one.

    Args:
        oracle: (T, T); see the module.

    Raises:
        DataError: the table is not square.
    """
    return forgetting_first(*_square(oracle))


def forgetting_beyond_oracle(table: Values, oracle: Values) -> Result:
    """What the mechanism forgot: mean over the earlier tasks of the accuracy lost since the task, minus `oracle_drop`.

    Raises:
        DataError: the tables are not square, or of two sizes.

    Example:
        >>> table, oracle = np.array([[0.9, 0.0], [0.5, 0.8]]), np.array([[0.9, 0.0], [0.7, 0.8]])
        >>> round(forgetting_beyond_oracle(table, oracle).value, 6)
        0.2
    """
    if table.shape != oracle.shape:
        raise DataError(f"the table is {table.shape}, that of the oracle {oracle.shape}; measure both on the same sequence.")
    lost, choice = forgetting_first(*_square(table)), oracle_drop(oracle)
    return Result(lost.value - choice.value, lost.reason or choice.reason)


def prototype_drift(model: "ContinualHyperTransformer", state: ContinualState, supports: Sequence[Episode]) -> Tensor:
    """(B, T) how far the support of each task lies from its class means under the newest weights: the mean over classes of the distance.

    It is 0 for the last task, and a probe only: deployed, nobody has the earlier supports.

    Args:
        model: what made the state.
        state: after the T tasks.
        supports: the T episodes in the order in which they were taken in, from `init_state` on.

    Raises:
        DataError: the state holds another number of tasks.
    """
    if len(supports) != state.n_tasks:
        raise DataError(f"the state took {state.n_tasks} tasks in, {len(supports)} supports are given; give those of all its tasks.")
    drifts, n_held = [], 0
    known = repeats(supports) if model.scenario == "class" else [None] * len(supports)
    for episode, again in zip(supports, known, strict=True):
        slots = torch.full((episode.n_max,), -1, device=episode.ways.device) if again is None else again
        if model.has_fixed_columns:
            slots = torch.arange(episode.n_max, device=episode.ways.device)
        column, brings = columns(slots, n_held)
        n_held += int(brings.sum())
        embeddings = model.embed(state, episode.support_x)
        means, counts = class_means(embeddings, episode.support_y, episode.n_max, episode.support_mask)
        column = column.expand(len(means), -1)
        distance = (means - state.prototypes.gather(1, column[..., None].expand_as(means))).norm(dim=-1)
        shown = counts > 0
        drifts.append((distance * shown).sum(1) / shown.sum(1))
    return torch.stack(drifts, 1)


def _square(table: Values) -> tuple[Values, Mask]:
    """The table with zeros above the diagonal, and the identity: task t is what event t teaches."""
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise DataError(f"the table must be (T, T), accuracy on task i after task t; got {table.shape}.")
    values = np.where(np.tri(len(table), dtype=bool), table, 0.0).astype(np.float64)
    return values, np.eye(len(table), dtype=bool)
