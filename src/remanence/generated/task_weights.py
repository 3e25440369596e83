"""What a HyperTransformer wrote: the weights of B tasks, to answer with, to keep on disk, or to take away as plain modules.

    weights = model.generate(support_x, support_y)       # B tasks in one pass
    weights.logits(x)                                    # every task on images of its own
    cnn = weights.to_module(3)                           # task 3 as an nn.Sequential that knows nothing of this library
    weights[3].save("oaks.safetensors")

Axes: B tasks, N images, C channels, H, W pixels, K kernel side, D embedding width, n ways.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from remanence.errors import StateMismatchError
from remanence.generated.target import EPS, KERNEL, TargetNet
from remanence.state import State, copy_state, load_state, save_state, state_bytes

_FORMAT = 1


@dataclass(frozen=True, eq=False, repr=False)
class TaskWeights:
    """Weights with a leading task axis.

    Args:
        target: the CNN that they are for.
        tensors: names as in `remanence.generated.target`, each (B, ...).
        ways: (B,) int64 classes of each task; further slots are never the answer.
        class_names: for each task, the names of its slots; may be empty.

    Example:
        >>> from remanence.generated.hypertransformer import HyperTransformer
        >>> model = HyperTransformer(TargetNet(channels=8, norm="group"), head="prototype", max_ways=5)
        >>> weights = model.generate(torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5))
        >>> print(weights)
        2 tasks of 5 ways: 7,636 bytes each
        >>> print(weights[1])
        1 task of 5 ways: 7,636 bytes
        >>> cnn = weights.to_module(1)
        >>> cnn(torch.rand(3, 1, 28, 28)).shape, sum(value.nbytes for value in cnn.parameters())
        (torch.Size([3, 5]), 7636)
    """

    target: TargetNet
    tensors: dict[str, Tensor]
    ways: Tensor
    class_names: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ways)

    def __iter__(self) -> Iterator["TaskWeights"]:
        """The tasks one by one, each with a leading axis of 1."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> "TaskWeights":
        """One task, still with a leading axis of 1; a view, no copy.

        Raises:
            IndexError: there is no such task.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"task {index} was asked for and these are weights of {_count(len(self))}; count from 0.")
        row = index % len(self)
        rows = slice(row, row + 1)
        return TaskWeights(
            self.target, {name: value[rows] for name, value in self.tensors.items()}, self.ways[rows], self.class_names[rows]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, recorded statistics included."""
        return state_bytes(self.tensors)

    def __str__(self) -> str:
        """How many tasks, and the bytes that one takes when kept by itself."""
        fewest, most = int(self.ways.min()), int(self.ways.max())
        ways = f"{most}" if fewest == most else f"{fewest} to {most}"
        return f"{_count(len(self))} of {ways} ways: {self[0].nbytes:,} bytes{' each' if len(self) > 1 else ''}"

    def __repr__(self) -> str:
        return f"<TaskWeights, {self}>"

    # --- answers -----------------------------------------------------------------------------------------------

    def logits(self, x: Tensor, bn_stats: Literal["query", "support"] = "support") -> Tensor:
        """Images (B, N, C, H, W) -> logits (B, N, n); -inf in slots that a task does not use.

        Args:
            x: each task's own images.
            bn_stats: see `TargetNet.embed`; "support" answers each image by itself.

        Raises:
            DataError: as `TargetNet.embed`.
        """
        return self.target.functional(x, self.tensors, bn_stats)

    def to_module(self, i: int = 0) -> nn.Sequential:
        """One task as a plain, frozen `nn.Sequential` in eval mode: images (N, C, H, W) -> logits (N, ways of the task).

        It holds copies and needs nothing of this library; each image is answered by itself. Leave it in eval mode: in training mode a
        batch norm forgets the statistics of the support set.

        Its answers are those of `logits` with bn_stats="support": within 1e-12 in float64; with norm="group" within 1e-5 in float32.
        With norm="batch" float32 rounds the two differently, by at most 3e-6 of the largest logit. That stayed below 1e-5 for a net
        trained on Omniglot (800 tasks of 5 ways and one shot, logits up to 25: at most 9.5e-6), but not for untrained nets on images
        of noise (up to 3.6e-5; either answer lies as far from that of float64).

        Raises:
            IndexError: there is no task i.
        """
        one = self[i]
        ways = int(one.ways)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, name in enumerate(self.target.conv_names, 1):
            kernel = one.tensors[f"{name}.weight"][0]
            conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], KERNEL, padding=KERNEL // 2, bias=False, device="meta")
            layers[name] = _filled(conv, weight=kernel)
            layers[f"relu{number}"], layers[f"pool{number}"] = nn.ReLU(), nn.MaxPool2d(2)
            layers[f"norm{number}"] = _norm(self.target, name, one.tensors)
        layers["flatten"] = nn.Flatten()
        linear = nn.Linear(self.target.embedding_width, ways, device="meta")
        layers["logits"] = _filled(linear, weight=one.tensors["logits.weight"][0, :ways], bias=one.tensors["logits.bias"][0, :ways])
        return nn.Sequential(layers).eval()

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write all tasks to one safetensors file, with the CNN's description, ways and class names; whole or not at all."""
        state: State = {"format": _FORMAT, "target": asdict(self.target), "ways": self.ways, "class_names": self.class_names}
        save_state(Path(path), {"task_weights": state | {"tensors": self.tensors}})

    @classmethod
    def load(cls, path: str | Path, target: TargetNet | None = None) -> "TaskWeights":
        """Read what `save` wrote, onto the CPU.

        Args:
            target: the CNN that the weights must be for; None takes the one in the file.

        Raises:
            StateMismatchError: the file is broken, holds something else, is of another format, or is for another CNN than `target`.
        """
        state = load_state(Path(path)).get("task_weights")
        if state is None:
            raise StateMismatchError(f"{path} is a state, but not one of task weights; give a file that TaskWeights.save wrote.")
        if state["format"] != _FORMAT:
            raise StateMismatchError(f"{path} is of format {state['format']}, this version reads {_FORMAT}; read it with what wrote it.")
        if target is not None:
            _require_same(path, state["target"], asdict(target))
        names = tuple(map(tuple, state["class_names"]))
        return cls(TargetNet(**state["target"]), state["tensors"], state["ways"], names)


def _count(n_tasks: int) -> str:
    return "1 task" if n_tasks == 1 else f"{n_tasks} tasks"


def _filled(module: nn.Module, **values: Tensor) -> nn.Module:
    """A module made on the meta device, where nothing is drawn at random, with frozen copies of `values` in place."""
    for name, value in values.items():
        copy = copy_state(value)
        setattr(module, name, nn.Parameter(copy, requires_grad=False) if name in ("weight", "bias") else copy)
    return module


def _norm(target: TargetNet, name: str, tensors: dict[str, Tensor]) -> nn.Module:
    affine = {"weight": tensors[f"{name}.gamma"][0], "bias": tensors[f"{name}.beta"][0]}
    if target.norm == "group":
        return _filled(nn.GroupNorm(1, target.channels, eps=EPS, device="meta"), **affine)
    statistics = {"running_mean": tensors[f"{name}.mean"][0], "running_var": tensors[f"{name}.var"][0]}
    seen = torch.zeros((), dtype=torch.int64, device=affine["bias"].device)
    return _filled(nn.BatchNorm2d(target.channels, eps=EPS, device="meta"), **affine, **statistics, num_batches_tracked=seen)


def _require_same(path: str | Path, there: State, here: State) -> None:
    differing = [f"{name} is {there.get(name)!r} there and {value!r} here" for name, value in here.items() if there.get(name) != value]
    if differing:
        raise StateMismatchError(
            f"{path} holds weights for another CNN: {', '.join(differing)}. Give the target that they were written for, or none."
        )
