"""What an Episode is checked for when it is made, over all tasks at once.

Axes: B tasks; S support; Q query; C channels; H, W pixels; n ways (the most of any task).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import DataError

if TYPE_CHECKING:
    from remanence.generated.episode import Episode

UNLABELED = -1


def check_tables(episode: "Episode") -> None:
    """Shapes, dtypes and devices, without reading a value."""
    _check_images(episode)
    n_tasks, n_support = episode.support_x.shape[:2]
    n_query = episode.query_x.shape[1]
    columns = (
        ("support_y", episode.support_y, (n_tasks, n_support), torch.int64),
        ("query_y", episode.query_y, (n_tasks, n_query), torch.int64),
        ("support_mask", episode.support_mask, (n_tasks, n_support), torch.bool),
        ("ways", episode.ways if len(episode.ways) else None, (n_tasks,), torch.int64),
    )
    for name, column, shape, dtype in columns:
        if column is None:
            continue
        if column.shape != shape or column.dtype != dtype:
            hint = " Episode.from_labels takes labels of other kinds." if dtype == torch.int64 and name != "ways" else ""
            raise DataError(f"{name} must be {shape} {dtype}, got {tuple(column.shape)} {column.dtype}.{hint}")
    devices = {str(value.device) for value in vars(episode).values() if isinstance(value, Tensor) and len(value)}
    if len(devices) > 1:
        raise DataError(f"the tensors of an episode must share a device, got {sorted(devices)}; use Episode.to after making it.")


def _check_images(episode: "Episode") -> None:
    for name, images in (("support_x", episode.support_x), ("query_x", episode.query_x)):
        if images.dim() != 5:
            raise DataError(
                f"{name} must be (B, {'S' if name == 'support_x' else 'Q'}, C, H, W), got {tuple(images.shape)}. "
                f"Episode.from_tensors takes one task without B; grey images have C = 1."
            )
        if not images.is_floating_point():
            raise DataError(
                f"{name} is {images.dtype}, floating point is needed; convert it as the training images were, "
                f"for bytes often x.float() / 255."
            )
    support, query = episode.support_x, episode.query_x
    if support.shape[0] != query.shape[0] or support.shape[2:] != query.shape[2:] or support.dtype != query.dtype:
        raise DataError(
            f"support and query must agree in tasks, image shape and dtype; got {tuple(support.shape)} {support.dtype} "
            f"and {tuple(query.shape)} {query.dtype}. Nothing is resized or converted silently."
        )
    if 0 in (*support.shape, *query.shape[2:]):
        raise DataError(f"support_x of shape {tuple(support.shape)} holds nothing; give at least one task with one sample.")


def check_values(episode: "Episode") -> None:
    """Pixels, labels, names and numbers of classes."""
    _require_finite("support", episode.support_x)
    _require_finite("query", episode.query_x)
    labelled = _labelled(episode)
    _check_ways(episode)
    _require_slots("support_y", episode.support_y, episode.ways, UNLABELED)
    if episode.query_y is not None:
        _require_slots("query_y", episode.query_y, episode.ways, 0)
    _check_classes(episode)
    if not episode.allow_empty:
        _require_shots(episode, labelled)


def _require_finite(name: str, images: Tensor) -> None:
    if bool(images.sum().isfinite()):  # one pass; a sum that overflows is looked at more closely
        return
    broken = (~images.flatten(2).isfinite().all(2)).nonzero()
    if len(broken):
        task, sample = broken[0].tolist()
        raise DataError(
            f"{name} sample {sample} of task {task} has a NaN or infinite pixel ({len(broken)} such samples); "
            f"leave them out or repair them."
        )


def _labelled(episode: "Episode") -> Tensor:
    """(B, S) which samples are present and labelled; every task has one."""
    labelled = episode.support_y != UNLABELED
    if episode.support_mask is not None:
        labelled &= episode.support_mask
    bare = (~labelled.any(1)).nonzero()[:, 0].tolist()
    if bare:
        raise DataError(f"task {bare[0]} has no labelled sample in its support ({len(bare)} such tasks); label at least one of each class.")
    return labelled


def _check_ways(episode: "Episode") -> None:
    if int(episode.ways.min()) < 1:
        task = int(episode.ways.argmin())
        raise DataError(f"ways of task {task} is {int(episode.ways[task])}; a task has at least one class.")


def _require_slots(name: str, labels: Tensor, ways: Tensor, lowest: int) -> None:
    wrong = ((labels < lowest) | (labels >= ways[:, None])).nonzero()
    if len(wrong):
        task, sample = wrong[0].tolist()
        or_unlabelled = f", or {UNLABELED} for unlabelled" if lowest == UNLABELED else ""
        raise DataError(
            f"{name} of task {task}, sample {sample} is {int(labels[task, sample])}; slots 0..{int(ways[task]) - 1} are "
            f"needed{or_unlabelled} ({len(wrong)} such labels). Episode.from_labels maps other labels to slots."
        )


def _check_classes(episode: "Episode") -> None:
    if episode.class_names:
        found = [len(names) for names in episode.class_names]
        if found != episode.ways.tolist():
            raise DataError(f"class_names name {found[:8]} classes a task, ways are {episode.ways.tolist()[:8]}; name every slot once.")
    if episode.class_ids is not None:
        shape = (len(episode), episode.n_max)
        if episode.class_ids.shape != shape or episode.class_ids.dtype != torch.int64:
            raise DataError(f"class_ids must be {shape} int64, got {tuple(episode.class_ids.shape)} {episode.class_ids.dtype}.")


def _require_shots(episode: "Episode", labelled: Tensor) -> None:
    # S samples show at most S classes, so that a class is missing among the first S + 1 wherever there are more
    width = min(episode.n_max, labelled.shape[1] + 1)
    slot = torch.where(labelled & (episode.support_y < width), episode.support_y, width)
    seen = torch.zeros(len(slot), width + 1, dtype=torch.bool, device=slot.device).scatter_(1, slot, True)
    empty = (~seen[:, :width] & (torch.arange(width, device=slot.device) < episode.ways[:, None])).nonzero()
    if len(empty):
        task, missing = empty[0].tolist()
        name = f" ('{episode.class_names[task][missing]}')" if episode.class_names else ""
        raise DataError(
            f"task {task} has no labelled sample of class {missing}{name}; give it one, "
            f"or say allow_empty=True if the class may go without and is never the answer."
        )
