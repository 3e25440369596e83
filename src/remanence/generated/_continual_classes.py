"""Which column of the class means a task's class belongs in: every class has one, however often it comes.

A *slot* is a class's number within a task, a *column* its place among all classes held.

Axes: B sequences, n ways of a task, P classes held, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from remanence.errors import DataError
from remanence.generated.continual_state import ContinualState
from remanence.generated.episode import Episode

OnRepeat = Literal["merge", "replace", "error"]


def columns(slots: Tensor, n_held: int) -> tuple[Tensor, Tensor]:
    """Where the classes of a task stand once it is taken in.

    Args:
        slots: (B, n) or (n,) int64 column that each slot has already, -1 for a new class.
        n_held: P before the task.

    Returns:
        The columns, of the same shape, and (n,) bool: which slots bring a column, because the class is new in some sequence.
    """
    brings = (slots < 0).reshape(-1, slots.shape[-1]).any(0)
    return torch.where(slots < 0, n_held + brings.cumsum(0) - 1, slots), brings


def repeats(sequence: Sequence[Episode]) -> list[Tensor | None]:
    """For each task, (B, n) the column in which a class of the same `class_ids` stands already, -1 for a new one.

    None for a task without such a class, and for one whose ids are unknown.
    """
    found: list[Tensor | None] = []
    ids = live = torch.zeros(len(sequence[0]), 0, dtype=torch.int64, device=sequence[0].ways.device)
    for episode in sequence:
        is_slot = torch.arange(episode.n_max, device=ids.device) < episode.ways[:, None]
        of_task = torch.zeros_like(is_slot, dtype=torch.int64) if episode.class_ids is None else episode.class_ids
        is_slot = is_slot & (episode.class_ids is not None)
        same = (of_task[..., None] == ids[:, None]) & (live > 0)[:, None] & is_slot[..., None]
        column = (same * torch.arange(1, ids.shape[1] + 1, device=ids.device)).sum(2) - 1
        _, brings = columns(column, ids.shape[1])
        found.append(column if bool((column >= 0).any()) else None)
        ids = torch.cat([ids, of_task[:, brings]], 1)
        live = torch.cat([live, (is_slot & (column < 0))[:, brings].long()], 1)
    return found


def slots_of_names(state: ContinualState, names: tuple[str, ...]) -> Tensor:
    """(n,) the column of each name, -1 for a new one."""
    column = {name: index for index, name in enumerate(state.class_names)}
    return torch.tensor([column.get(name, -1) for name in names], device=state.prototypes.device)


def usual_slots(state: ContinualState, n_ways: int, is_fixed: bool) -> Tensor:
    """(n,) all new; or, where slot j of every task is class j, new beyond the P classes held."""
    column = torch.arange(n_ways, device=state.prototypes.device)
    return torch.where(column < state.prototypes.shape[1], column, -1) if is_fixed else torch.full_like(column, -1)


def with_classes(state: ContinualState, means: Tensor, counts: Tensor, slots: Tensor, on_repeat: OnRepeat = "merge") -> ContinualState:
    """The state one task on, with the class means of that task in it.

    Args:
        state: P classes.
        means: (B, n, D).
        counts: (B, n) samples behind each; a class with none changes nothing.
        slots: as in `columns`.
        on_repeat: what a class that is held becomes: "merge": the mean over all its samples; "replace": that of the new ones.

    Raises:
        DataError: on_repeat is "error" and a class comes again.
    """
    slots = slots.to(means.device).expand(len(means), -1)
    _, brings = columns(slots, state.prototypes.shape[1])
    is_new = slots < 0
    prototypes, held = state.prototypes, state.counts
    if not bool(is_new.all()):
        prototypes, held = _again(state, means, counts, slots, on_repeat)
    prototypes = torch.cat([prototypes, torch.where(is_new[..., None], means, 0.0)[:, brings]], 1)
    held = torch.cat([held, torch.where(is_new, counts, 0.0)[:, brings]], 1)
    arrived = torch.cat([state.task_of_class, state.task_of_class.new_full((int(brings.sum()),), -1)])
    arrived = torch.where((arrived < 0) & (held > 0).any(0), state.n_tasks, arrived)
    return replace(state, prototypes=prototypes, counts=held, task_of_class=arrived, n_tasks=state.n_tasks + 1)


def _again(state: ContinualState, means: Tensor, counts: Tensor, slots: Tensor, on_repeat: OnRepeat) -> tuple[Tensor, Tensor]:
    """Means and counts of the P columns after classes that are held came again."""
    column = slots.clamp(min=0)
    before = state.counts.gather(1, column)
    old = state.prototypes.gather(1, column[..., None].expand_as(means))
    comes_again = (slots >= 0) & (before > 0) & (counts > 0)
    if on_repeat == "error" and bool(comes_again.any()):
        known = sorted(set(slots[comes_again].tolist()))
        shown = [state.class_names[index] for index in known] if state.class_names else known
        raise DataError(f"{len(known)} classes are held already (first three: {shown[:3]}); say on_repeat='merge' or 'replace'.")
    total = counts if on_repeat == "replace" else before + counts
    merged = torch.where((counts == total)[..., None], means, old + (counts / total.clamp(min=1))[..., None] * (means - old))
    changed = (slots >= 0) & (counts > 0)
    # what does not change goes to a column behind the others, which is then cut off
    target = torch.where(changed, slots, state.prototypes.shape[1])
    prototypes = torch.nn.functional.pad(state.prototypes, (0, 0, 0, 1)).scatter(1, target[..., None].expand_as(means), merged)
    return prototypes[:, :-1], torch.nn.functional.pad(state.counts, (0, 1)).scatter(1, target, total)[:, :-1]


def names_after(state: ContinualState, names: tuple[str, ...], slots: Tensor, is_fixed: bool) -> tuple[str, ...]:
    """The names of all columns once a task is taken in.

    Args:
        names: n, or none.
        slots: (n,) as in `columns`.
        is_fixed: slot j of every task is class j.

    Raises:
        DataError: some classes would have names and others none, or a fixed class would change its name.
    """
    held, n_held = state.class_names, state.prototypes.shape[1]
    if is_fixed:
        changed = [(old, new) for old, new in zip(held, names, strict=False) if old != new]
        if changed:
            old, new = changed[0]
            raise DataError(f"class '{old}' is named '{new}' here, but slot j is class j in every step; keep the order.")
        return max(held, names, key=len)
    if n_held and bool(held) != bool(names):
        nameless = f"the {n_held} classes held have no names" if names else f"the classes held have names (first three: {list(held[:3])})"
        raise DataError(f"{nameless}, so that a class which comes again would not be known; name the classes of every task or of none.")
    if not names:
        return ()
    column, _ = columns(slots, n_held)
    found = dict(enumerate(held)) | dict(zip(column.tolist(), names, strict=True))
    return tuple(found[index] for index in range(len(found)))


def among(logits: Tensor, state: ContinualState, task: int | None) -> Tensor:
    """Logits (B, N, P), -inf where a sequence does not hold the class, or it came in another task."""
    outside = state.counts == 0
    if task is not None:
        outside = outside | (state.task_of_class != task)
    return logits.masked_fill(outside[:, None], -torch.inf)
