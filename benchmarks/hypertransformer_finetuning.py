"""Fine-tuning the small CNN on a support set with Adam: alone until it peaks, and along a stream with or without replay.

    curve = fine_tuning_curve(episode, target, ProtoNet(target).start(len(episode), 5), lr=1e-2, steps=100)
    curve.peak                                            # Peak(steps, accuracy, seconds)

B tasks are fine-tuned in one batch: Adam works on every number by itself, so their sum of losses leaves each task its own steps.

Axes: B tasks or sequences; T tasks of a sequence; S support; Q queries; n ways; P classes of all tasks; E evaluations.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from hypertransformer_baselines import Tensors, TinyCNN, accuracy, recorded
from hypertransformer_maml import require_slots, task_losses
from torch import Tensor

from remanence.errors import SettingError
from remanence.generated.episode import Episode
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng

_HEAD = ("logits.weight", "logits.bias")


class Peak(NamedTuple):
    """Where a curve's mean accuracy is highest first, and the seconds it took to get there.

    On one task's few queries it is a matter of luck: find the steps on many tasks, and time these steps on one.
    """

    steps: int
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Curve:
    """Accuracy on queries along fine-tuning.

    Args:
        steps: (E,) int64, from 0.
        accuracy: (E, B).
        seconds: (E,) spent on fine-tuning itself up to there, all B tasks together; evaluations are not counted.
    """

    steps: Tensor
    accuracy: Tensor
    seconds: Tensor

    @property
    def peak(self) -> Peak:
        means = self.accuracy.mean(1)
        best = int(means.argmax())
        return Peak(int(self.steps[best]), float(means[best]), float(self.seconds[best]))


@dataclass(frozen=True)
class Stream:
    """Accuracies (B, T, T) of task i (last axis) after task t, NaN for i > t: among all classes so far, and among the task's own."""

    class_incremental: Tensor
    task_incremental: Tensor


def random_start(target: TargetNet, n_tasks: int, n_ways: int, seed: int = 0) -> Tensors:
    """Untrained tensors, the same for all tasks; a last layer of zeros."""
    with keyed_rng(seed, "random start"):
        return TinyCNN(target).start(n_tasks, n_ways)


def fine_tune(
    support_x: Tensor, support_y: Tensor, target: TargetNet, start: Mapping[str, Tensor], lr: float = 1e-2, steps: int = 50
) -> Tensors:
    """Train all tensors of B CNNs on their supports, whole batches; statistics are those of the support itself.

    Args:
        support_x: (B, S, C, H, W).
        support_y: (B, S) int64 slots.
        target: the CNN.
        start: tensors (B, ...), left as they are.
        lr: Adam's rate.
        steps: of Adam.

    Returns:
        Tensors (B, ...) with the statistics of the support among them.

    Raises:
        SettingError: a rate or number of steps that is not above 0.
        DataError: a label is no slot of the last layer.
    """
    trained = _last(_adam(support_x, support_y, target, start, lr, steps))
    with torch.no_grad():
        return recorded(target, support_x, trained)[1]


def fine_tuning_curve(
    episode: Episode, target: TargetNet, start: Mapping[str, Tensor], lr: float = 1e-2, steps: int = 100, every: int = 5,
    bn_stats: Literal["query", "support"] = "query",
) -> Curve:  # fmt: skip
    """Accuracy on the queries before fine-tuning and after every `every` steps of it.

    Raises:
        SettingError: as `fine_tune`, or `every` below 1.
    """
    if every < 1:
        raise SettingError(f"fine_tuning_curve: every={every} must be 1 or more.")
    found = [(0, _answered(target, start, episode, bn_stats), 0.0)]
    spent, begun = 0.0, time.perf_counter()
    for step, tensors in enumerate(_adam(episode.support_x, episode.support_y, target, start, lr, steps), 1):
        if step % every == 0:
            spent += time.perf_counter() - begun
            found.append((step, _answered(target, tensors, episode, bn_stats), spent))
            begun = time.perf_counter()
    taken, accuracies, seconds = zip(*found, strict=True)
    return Curve(torch.tensor(taken), torch.stack(accuracies), torch.tensor(seconds))


def fine_tuned_stream(
    sequence: Sequence[Episode], target: TargetNet, start: Mapping[str, Tensor], lr: float = 1e-2, steps: int = 50, replay: bool = True
) -> Stream:  # fmt: skip
    """Fine-tune along T tasks, one linear layer growing by each task's classes; Adam starts afresh at every task.

    Args:
        sequence: T episodes of the same B sequences, no class in two of them.
        target: with norm="group".
        start: tensors (B, ...) whose last layer has a row for each class of the whole sequence.
        lr, steps: of Adam, for each task.
        replay: train on the supports of all tasks so far instead of the newest one alone.

    Raises:
        SettingError: another norm; a last layer of another height; as `fine_tune`.
    """
    first = [0]
    for episode in sequence:
        first.append(first[-1] + episode.n_max)
    if target.norm != "group":
        raise SettingError(f"fine_tuned_stream: norm='{target.norm}' lets queries of different tasks change each other; give 'group'.")
    if start["logits.bias"].shape[1] != first[-1]:
        raise SettingError(f"fine_tuned_stream: the tasks have {first[-1]} classes, the last layer {start['logits.bias'].shape[1]}.")
    tensors = dict(start)
    found: list[tuple[Tensor, Tensor]] = []
    for t in range(len(sequence)):
        kept = range(t + 1) if replay else range(t, t + 1)
        x = torch.cat([sequence[i].support_x for i in kept], 1)
        y = torch.cat([sequence[i].support_y + first[i] for i in kept], 1)
        head = {name: tensors[name][:, : first[t + 1]] for name in _HEAD}
        trained = _last(_adam(x, y, target, tensors | head, lr, steps))
        found.append(_row(target, trained, sequence, first, t))
        tensors = trained | {name: torch.cat([trained[name], tensors[name][:, first[t + 1] :]], 1) for name in _HEAD}
    return Stream(*(torch.stack(kind, 1) for kind in zip(*found, strict=True)))


def _adam(x: Tensor, y: Tensor, target: TargetNet, start: Mapping[str, Tensor], lr: float, steps: int) -> Iterator[Tensors]:
    """The tensors after each step; always the same ones, changed in place."""
    if lr <= 0 or steps < 1:
        raise SettingError(f"fine-tuning: lr={lr} and steps={steps} must be above 0.")
    require_slots("fine-tuning", y, start["logits.bias"].shape[1])
    tensors = {name: value.detach().clone().requires_grad_() for name, value in start.items() if not name.endswith((".mean", ".var"))}
    optimizer = torch.optim.Adam(tensors.values(), lr=lr, fused=True)
    for _ in range(steps):
        with torch.enable_grad():
            optimizer.zero_grad()
            task_losses(target.functional(x, tensors), y).sum().backward()
            optimizer.step()
        yield {name: value.detach() for name, value in tensors.items()}


def _last(steps: Iterator[Tensors]) -> Tensors:
    return deque(steps, maxlen=1).pop()


@torch.no_grad()
def _answered(target: TargetNet, tensors: Mapping[str, Tensor], episode: Episode, bn_stats: Literal["query", "support"]) -> Tensor:
    if bn_stats == "support":
        tensors = recorded(target, episode.support_x, tensors)[1]
    return accuracy(target.functional(episode.query_x, tensors, bn_stats), episode)


@torch.no_grad()
def _row(target: TargetNet, tensors: Tensors, sequence: Sequence[Episode], first: list[int], t: int) -> tuple[Tensor, Tensor]:
    """Accuracies (B, T) after task t of all tasks so far: among all classes so far, and among the task's own."""
    logits = target.functional(torch.cat([episode.query_x for episode in sequence[: t + 1]], 1), tensors)
    parts = logits.split([episode.query_x.shape[1] for episode in sequence[: t + 1]], 1)
    among_all = logits.new_full((len(logits), len(sequence)), torch.nan)
    among_own = among_all.clone()
    for i, (part, episode) in enumerate(zip(parts, sequence, strict=False)):
        among_all[:, i] = accuracy(part, episode, first[i])
        among_own[:, i] = accuracy(part[..., first[i] : first[i + 1]], episode)
    return among_all, among_own
