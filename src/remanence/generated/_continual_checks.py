"""What a Continual HyperTransformer's step and answer are checked for.

Axes: B sequences, S support samples, N images, n ways, P classes held.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.generated.continual_state import ContinualState, UnknownTask
from remanence.generated.episode import UNLABELED, Episode

if TYPE_CHECKING:
    from remanence.generated.continual import ContinualHyperTransformer

_GROWTH = 10.0
"""Times the learned start: weights that large were never seen in training."""


def require_images(model: "ContinualHyperTransformer", state: ContinualState, x: Tensor) -> None:
    """Refuse a state of another model, and images (B, N, C, H, W) that fit neither the CNN nor the state.

    Raises:
        StateMismatchError: a model of other layers made the state.
        DataError: the images have other axes, or another number of sequences.
    """
    state.require_of(model)
    model.target.require_fit(x)
    if len(x) != len(state):
        raise DataError(f"the state holds {len(state)} sequences, the images are of {len(x)}; give images (sequences, images, C, H, W).")


def require_question(model: "ContinualHyperTransformer", state: ContinualState, x: Tensor, task: int | None) -> None:
    """Refuse to answer without classes, on broken images, or for a task that is not held.

    Raises:
        DataError: no class is held; a pixel is not finite; a task must be named and is not.
        UnknownTask: no class came in that task.
    """
    if not state.n_tasks:
        raise DataError("the state holds no class yet; call step() first.")
    require_images(model, state, x)
    broken = (~x.flatten(2).isfinite().all(2)).nonzero().tolist()
    if broken:
        sequence, image = broken[0]
        raise DataError(f"image {image} of sequence {sequence} has a NaN or infinite pixel ({len(broken)} such images); leave them out.")
    known = state.task_ids
    if task is None and model.scenario == "task" and model.head == "prototype":
        raise DataError(f"scenario 'task' answers for a named task; give task=, one of {', '.join(map(str, known))}.")
    if task is not None and task not in known:
        raise UnknownTask(f"no class came in task {task!r}; this state knows {', '.join(map(str, known))}.")


def require_shown(episode: Episode, names: tuple[str, ...]) -> None:
    """Refuse a class without a labelled sample: it would have no mean.

    Raises:
        DataError: with the sequence and the class.
    """
    slot = torch.arange(episode.n_max, device=episode.ways.device)
    labels = episode.support_y if episode.support_mask is None else episode.support_y.where(episode.support_mask, UNLABELED)
    is_shown = (labels[..., None] == slot).any(1)
    bare = (~is_shown & (slot < episode.ways[:, None])).nonzero().tolist()
    if bare:
        sequence, missing = bare[0]
        name = f" ('{names[missing]}')" if names else ""
        raise DataError(f"sequence {sequence} has no labelled sample of class {missing}{name}; give it one, or leave the class out.")


def require_slots(model: "ContinualHyperTransformer", state: ContinualState, slots: Tensor, n_ways: int) -> None:
    """Refuse slots that name no column, or one of them twice.

    Raises:
        DataError: wrong shape, a number outside -1..P-1, two classes of a task in one column, or with a generated head another order
            than that of its columns.
    """
    n_held = state.prototypes.shape[1]
    if slots.dtype != torch.int64 or tuple(slots.shape) not in ((n_ways,), (len(state), n_ways)):
        raise DataError(
            f"slots must be ({n_ways},) or ({len(state)}, {n_ways}) int64, one number for each class of the task; "
            f"got {tuple(slots.shape)} {slots.dtype}."
        )
    if bool(((slots < -1) | (slots >= n_held)).any()):
        raise DataError(f"slots are {slots.tolist()}, {n_held} classes are held; give the column of one, counted from 0, or -1 if new.")
    ordered = slots.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise DataError(f"slots are {slots.tolist()}: two classes of one task cannot be the same class held; join their samples instead.")
    if model.head == "generated" and not bool((slots == torch.arange(n_ways, device=slots.device)).all()):
        raise DataError(f"slots are {slots.tolist()}: with a generated head slot j is class j; number the labels of every task so.")


def require_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of a task's classes, each once.

    Raises:
        SettingError: one word was given in place of a list.
        DataError: a name stands twice.
    """
    if isinstance(names, str):
        raise SettingError(f"class_names='{names}' is one word; give a list of names, one for each class of the task.")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"class_names name {twice[:3]} more than once; two classes of a task need two names.")
    return tuple(names)


def require_sound(model: "ContinualHyperTransformer", before: ContinualState, after: ContinualState) -> None:
    """Refuse a state that is not finite; warn when its weights leave the range that training knew.

    Raises:
        DataError: with the names of the layers.

    Warns:
        UserWarning: a layer's norm has just passed 10 times that of its learned start.
    """
    values = {**after.slices, "class means": after.prototypes}
    broken = [name for name, value in values.items() if not bool(value.isfinite().all())]
    if broken:
        raise DataError(
            f"step {after.n_tasks}: {', '.join(broken)} would hold a NaN or an infinity; the state is as it was. Look at the "
            f"images' range, or begin again from init_state()."
        )
    growth = model.growth(after)
    if max(growth.values()) > _GROWTH >= max(model.growth(before).values()):
        worst = max(growth, key=growth.__getitem__)
        warnings.warn(
            f"step {after.n_tasks}: the weights of {worst} have grown to {growth[worst]:.1f} times their learned start, further than in "
            f"training; begin again from init_state(), or train with renorm=True or more tasks.",
            stacklevel=3,
        )
