"""What a Continual HyperTransformer carries from task to task, and its file.

    state.save(Path("after_3.safetensors"), model)
    state = ContinualState.load(Path("after_3.safetensors"), model)       # goes on with the same bits

The file holds slices, class means, counts and names; the CNN is built from the slices when it is read. It names the model by a
hash: under another model neither slices nor means have a meaning.

Axes: B sequences, T slices of a layer, b numbers in a slice, P classes held, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import DataError, StateMismatchError
from remanence.state import load_state, save_state, state_bytes

if TYPE_CHECKING:
    from remanence.generated.continual import ContinualHyperTransformer

_KIND, _FORMAT = "continual hypertransformer", 1


class UnknownTask(DataError, KeyError):  # noqa: N818 - named as its neighbours are
    """A task is asked for that the state does not hold."""

    __str__ = Exception.__str__  # KeyError shows its message in quotes, as if it were a key


@dataclass(frozen=True, eq=False)
class ContinualState:
    """All that is carried from task to task, for B sequences; keeping an old one is the undo.

    Args:
        slices: what the written layers hold: name -> (B, T, b).
        prototypes: (B, P, D) class means, each in the embedding of its own time.
        counts: (B, P) samples behind each mean; 0 where a sequence does not have the class.
        task_of_class: (P,) int64 task in which a class came first (in any of the sequences), counted from 0; -1 before it came.
        n_tasks: tasks taken in.
        tensors: of the CNN that the slices stand for, as in `remanence.generated.target`; empty before the first task.
        class_names: of the classes held, the same for all sequences; empty where they have no names.
    """

    slices: dict[str, Tensor]
    prototypes: Tensor
    counts: Tensor
    task_of_class: Tensor
    n_tasks: int
    tensors: dict[str, Tensor]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """B, how many sequences."""
        return len(self.prototypes)

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The tasks that classes came in."""
        return tuple(sorted({task for task in self.task_of_class.tolist() if task >= 0}))

    @property
    def num_bytes(self) -> int:
        """Bytes of what the file holds, names aside: slices, recorded statistics, 4 D of mean and 12 of count and task for each class.

        Those of one sequence: divide by B, but for the 8 P of `task_of_class`.
        """
        return state_bytes(self._carried())

    def _carried(self) -> dict[str, Tensor | dict[str, Tensor]]:
        statistics = {name: value for name, value in self.tensors.items() if name.endswith((".mean", ".var"))}
        return {
            "slices": self.slices, "statistics": statistics, "prototypes": self.prototypes, "counts": self.counts,
            "task_of_class": self.task_of_class,
        }  # fmt: skip

    def to(self, device: torch.device | str) -> "ContinualState":
        """The same state on `device`."""
        return self._with(lambda value: value.to(device))

    def detach(self) -> "ContinualState":
        """The same state without the graph that made it; `step` under `torch.no_grad()` makes none."""
        return self._with(Tensor.detach)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "ContinualState":
        return replace(
            self,
            slices={name: change(value) for name, value in self.slices.items()},
            tensors={name: change(value) for name, value in self.tensors.items()},
            prototypes=change(self.prototypes),
            counts=change(self.counts),
            task_of_class=change(self.task_of_class),
        )

    def require_of(self, model: "ContinualHyperTransformer") -> None:
        """Refuse a state whose layers are not those of `model`.

        Raises:
            StateMismatchError: names or sizes of the slices differ.
        """
        wanted = {name: value.shape[1] for name, value in model.base.items()}
        found = {name: value.shape[2] for name, value in self.slices.items()}
        if wanted != found or self.prototypes.shape[2] != model.target.embedding_width:
            raise StateMismatchError(
                f"the state holds layers of {found} numbers a slice and means of {self.prototypes.shape[2]}, the model {wanted} and "
                f"{model.target.embedding_width}; use the model that made it, or begin with its init_state()."
            )

    def save(self, path: Path | str, model: "ContinualHyperTransformer") -> None:
        """Write one file, whole or not at all.

        Args:
            path: its folder is made when absent.
            model: the one that made the state.

        Raises:
            StateMismatchError: the state has other layers than `model`.
        """
        from remanence.generated.files import model_fingerprint

        self.require_of(model)
        head = {"kind": _KIND, "format": _FORMAT, "model": model_fingerprint(model)}
        counted = {"n_tasks": self.n_tasks, "class_names": self.class_names}
        save_state(Path(path), head | counted | self._carried())

    @classmethod
    def load(cls, path: Path | str, model: "ContinualHyperTransformer") -> "ContinualState":
        """The state that `save` wrote, on the model's device.

        Raises:
            StateMismatchError: the file is broken or something else, or another model made it.
        """
        from remanence.generated.files import model_fingerprint

        saved = load_state(Path(path))
        if not isinstance(saved, dict) or (saved.get("kind"), saved.get("format")) != (_KIND, _FORMAT):
            raise StateMismatchError(f"{path} holds no ContinualState of format {_FORMAT}; give a file that ContinualState.save wrote.")
        found = model_fingerprint(model)
        if saved["model"] != found:
            raise StateMismatchError(
                f"{path} was made by model {saved['model']}, this one is {found}: its class means have no meaning here. Load the model "
                f"that made it, or take its tasks in again from init_state()."
            )
        state = cls(
            saved["slices"], saved["prototypes"], saved["counts"], saved["task_of_class"], saved["n_tasks"], saved["statistics"],
            tuple(saved["class_names"]),
        ).to(model.log_scale.device)  # fmt: skip
        return replace(state, tensors=model.tensors_of(state.slices) | state.tensors) if state.n_tasks else state
