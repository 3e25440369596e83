"""What the learners of this room share: reading the meta-trained model, refusing what it cannot take, tasks of many sizes as one batch.

Axes: T tasks held, B tasks of a batch, S support samples, N images, C channels, H, W pixels, n ways, P classes held.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from remanence.errors import DataError, StateMismatchError
from remanence.generated.episode import UNLABELED
from remanence.generated.files import load_hypertransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.learner import Learner, Prediction, require_learnable
from remanence.state import State
from remanence.task import Data, Task


@dataclass(frozen=True, eq=False)
class Written:
    """What is held of a task: its own tensors (1, ...), how many examples it saw of each class, and these, where they are kept."""

    tensors: dict[str, Tensor]
    counts: dict[int, int]
    support: Data | None

    @property
    def classes(self) -> list[int]:
        """Ascending, the order of the slots."""
        return sorted(self.counts)

    def state(self) -> State:
        counts = {str(label): count for label, count in self.counts.items()}
        return {"tensors": self.tensors, "counts": counts, "support": None if self.support is None else table_state(self.support)}


def read_model(model: str | Path | HyperTransformer, device: torch.device) -> HyperTransformer:
    """The model on `device`, in evaluation mode and without gradients: read from its folder, or copied."""
    own = copy.deepcopy(model) if isinstance(model, HyperTransformer) else load_hypertransformer(Path(model))
    return own.to(device).eval().requires_grad_(False)


def require_task(learner: Learner, model: HyperTransformer, task: Task) -> Data:
    """The train set of a task that `model` can write weights for.

    Raises:
        DataError: no train set, images of another kind, a pixel that is not finite, or more classes than the model knows slots.
        SettingError: the learner does not give this kind of answer.
    """
    data = require_learnable(learner, task)
    where = f"task '{task.name}'"
    require_images(model.target, data.inputs, where)
    broken = (~data.inputs.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise DataError(f"{where}: {len(broken)} images have a NaN or infinite pixel (first three: {broken[:3]}); leave them out.")
    if len(task.classes) > model.max_ways:
        raise DataError(
            f"{where} has {len(task.classes)} classes, this model was trained for at most {model.max_ways}; "
            f"split the task, or train a model with larger max_ways."
        )
    return data


def require_images(target: TargetNet, images: Tensor, where: str) -> None:
    """Refuse images that `target` cannot take; nothing is resized or converted.

    Raises:
        DataError: not (N, C, H, W) of the target's size, or not floating point.
    """
    wanted = (target.in_channels, target.image_size, target.image_size)
    if not images.is_floating_point() or tuple(images.shape[1:]) != wanted:
        raise DataError(
            f"{where}: images are {images.dtype} (N, {', '.join(map(str, images.shape[1:]))}), this model takes float32 "
            f"(N, {', '.join(map(str, wanted))}). Bring them to this size and to the range of the training images first."
        )


def require_same_model(state: State, fingerprint: str) -> None:
    """Refuse a learner's state that was made under another model.

    Raises:
        StateMismatchError: the hashes differ.
    """
    if state["model"] != fingerprint:
        raise StateMismatchError(
            f"the state was made with model {state['model']}, this learner reads {fingerprint}: weights and class means have no meaning "
            f"here. Give the model that it was made with."
        )


def nothing_known(images: Tensor) -> Prediction:
    """The answer before anything was learned."""
    return Prediction(images.new_empty(len(images), 0), torch.empty(0, dtype=torch.int64, device=images.device))


def count(targets: Tensor) -> dict[int, int]:
    """How many examples there are of each class."""
    labels, counts = torch.unique(targets, return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def table_state(data: Data) -> dict[str, Tensor]:
    """A kept support set as a state."""
    return {"inputs": data.inputs, "targets": data.targets, "ids": data.ids}


def padded(tables: list[Data]) -> tuple[Tensor, Tensor, Tensor]:
    """Support sets as images (B, S, C, H, W), slots (B, S) and the mask of those that are there."""
    slots = [torch.unique(data.targets, return_inverse=True)[1] for data in tables]
    x = pad_sequence([data.inputs for data in tables], batch_first=True)
    y = pad_sequence(slots, batch_first=True, padding_value=UNLABELED)
    return x, y, y != UNLABELED


def to_ways(name: str, value: Tensor, n_ways: int) -> Tensor:
    """The last layer of a task with fewer classes than the batch has."""
    if name == "logits.weight":
        return nn.functional.pad(value, (0, 0, 0, n_ways - value.shape[1]))
    if name == "logits.bias":
        return nn.functional.pad(value, (0, n_ways - value.shape[1]), value=-torch.inf)
    return value


def best_of(logits: Tensor, labels: list[Tensor]) -> Prediction:
    """Answers of all tasks (T, N, n) -> (N, P); of a class in several tasks the largest counts.

    Args:
        labels: of each task, the source labels of its slots.
    """
    held = torch.cat([torch.arange(logits.shape[2], device=logits.device) < len(some) for some in labels])
    flat = logits.transpose(0, 1).flatten(1)[:, held]
    classes, column = torch.unique(torch.cat(labels), return_inverse=True)
    best = flat.new_full((len(flat), len(classes)), -torch.inf)
    return Prediction(best.scatter_reduce(1, column.expand(len(flat), -1), flat, "amax"), classes)
