"""What a Continual HyperTransformer is trained on: every prefix of a sequence, all tasks so far.

    logits = model.unroll(sequence)
    loss, table = continual_loss(logits, continual_targets(sequence))

Axes: B sequences, T tasks, Q queries of a task, n ways, P classes held.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.generated._continual_classes import columns, repeats
from remanence.generated.episode import Episode

Weighting = Literal["all", "last", "current+last"]


def continual_targets(sequence: Sequence[Episode], shared_classes: bool = False, merge_repeats: bool = True) -> list[Tensor]:
    """For each t, (B, (t + 1) * Q) columns of `unroll`'s logits; the classes of a task stand behind those of the tasks before it.

    Args:
        sequence: T episodes of the same B sequences.
        shared_classes: slot j is class j in every task: scenario "minibatch", or a generated head.
        merge_repeats: a class that comes again, by its `class_ids`, keeps its column: scenario "class". False for scenario "task",
            where every task has columns of its own.

    Raises:
        DataError: a task's queries have no answers.
    """
    targets: list[Tensor] = []
    known = repeats(sequence) if merge_repeats and not shared_classes else [None] * len(sequence)
    n_held = 0
    for t, (episode, slots) in enumerate(zip(sequence, known, strict=True)):
        if episode.query_y is None:
            raise DataError(f"task {t} of the sequence has no query_y; give the answers of its queries.")
        if shared_classes:
            targets.append(episode.query_y)
        elif slots is None:
            targets.append(episode.query_y + n_held)
            n_held += episode.n_max
        else:
            column, brings = columns(slots, n_held)
            targets.append(column.gather(1, episode.query_y))
            n_held += int(brings.sum())
    return [torch.cat(targets[: t + 1], 1) for t in range(len(targets))]


def continual_loss(logits: Sequence[Tensor], targets: Sequence[Tensor], weighting: Weighting = "all") -> tuple[Tensor, Tensor]:
    """Cross-entropy of all prefixes of a sequence.

    Args:
        logits: for each t, (B, (t + 1) * Q, P); see `ContinualHyperTransformer.unroll`. Every task has the same number of queries.
        targets: for each t, (B, (t + 1) * Q).
        weighting: "all": the mean over prefixes of the mean over their tasks, so that late prefixes do not drown early ones;
            "last": the last prefix alone; "current+last": half the newest task of every prefix, half all tasks of the last one.

    Returns:
        The loss, and (T, T) losses of task i after task t, NaN above the diagonal.

    Raises:
        SettingError: the weighting is unknown.
        DataError: the number of prefixes, or of queries in one, does not fit.
    """
    if weighting not in ("all", "last", "current+last"):
        raise SettingError(f"continual_loss: weighting='{weighting}' is unknown; give 'all', 'last' or 'current+last'.")
    _check(logits, targets)
    n_tasks = len(logits)
    table = logits[0].new_full((n_tasks, n_tasks), torch.nan)
    losses: list[Tensor] = []
    for t, (answer, target) in enumerate(zip(logits, targets, strict=True)):
        each = F.cross_entropy(answer.flatten(0, 1), target.flatten(), reduction="none").view(len(target), t + 1, -1)
        losses.append(each.mean((0, 2)))
        table[t, : t + 1] = losses[-1].detach()
    if weighting == "all":
        return torch.stack([row.mean() for row in losses]).mean(), table
    if weighting == "last":
        return losses[-1].mean(), table
    return 0.5 * (torch.stack([row[-1] for row in losses]).mean() + losses[-1].mean()), table


def accuracy_table(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """(B, T, T) share of right answers of each sequence to task i after task t, NaN above the diagonal; arguments as `continual_loss`.

    The mean over B is the matrix that `remanence.generated.continual_measures` reads.
    """
    _check(logits, targets)
    n_tasks = len(logits)
    table = torch.full((len(targets[0]), n_tasks, n_tasks), torch.nan, device=targets[0].device)
    for t, (answer, target) in enumerate(zip(logits, targets, strict=True)):
        table[:, t, : t + 1] = (answer.argmax(-1) == target).float().view(len(target), t + 1, -1).mean(2)
    return table


def _check(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    if not logits or len(logits) != len(targets):
        raise DataError(f"{len(logits)} tensors of logits and {len(targets)} of targets; give one of each for every task, at least one.")
    for t, (answer, target) in enumerate(zip(logits, targets, strict=True)):
        if answer.shape[:2] != target.shape or target.shape[1] % (t + 1) or not target.numel():
            raise DataError(
                f"after task {t} logits are {tuple(answer.shape)} and targets {tuple(target.shape)}; both need the same number of queries "
                f"of {t + 1} tasks. Let every task ask the same number of queries, at least one."
            )
