"""What the rules of the contract stand on: a learner with a history, comparing states, guarding global generators."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import ErasureNotSupported
from remanence.learner import Learner, Prediction, Progress, Steps
from remanence.state import load_state, save_state
from remanence.task import Task, Verb

MakeLearner = Callable[[int], Learner]
Deed = tuple[Verb, Task]


@dataclass(frozen=True)
class Bench:
    make: MakeLearner
    first: Task
    second: Task
    path: Path
    exact_forget: bool

    def after(self, *deeds: Deed) -> Learner:
        """A learner to which these things happened."""
        learner = self.make(0)
        for deed in deeds:
            drain(open_verb(learner, deed))
        return learner

    def through_disk(self, learner: Learner) -> Learner:
        save_state(self.path, learner.state_dict())
        twin = self.make(0)
        twin.load_state_dict(load_state(self.path))
        return twin

    def ask(self, learner: Learner, task: Task, inputs: Tensor | None = None, reader: str | None = None) -> Prediction:
        name = task.name if learner.needs_task_id else None
        return learner.predict(task.test.inputs if inputs is None else inputs, name, learner.readers[0] if reader is None else reader)

    def forgets(self) -> bool:
        """Whether the first of two tasks can be taken out; a mechanism may refuse because the second rests on it."""
        try:
            self.after(("learn", self.first), ("learn", self.second), ("forget", self.first))
        except ErasureNotSupported:
            return False
        return True

    def histories(self) -> tuple[list[Deed], ...]:
        """Nothing, one task, two tasks."""
        return [], [("learn", self.first)], [("learn", self.first), ("learn", self.second)]

    def running(self) -> Iterator[tuple[str, list[Deed], Deed]]:
        """The verbs whose every yield is looked at: name, what happened before, the verb itself."""
        learned: list[Deed] = [("learn", self.first), ("learn", self.second)]
        yield "learn on a fresh learner", [], learned[0]
        yield "learn of a second task", learned[:1], learned[1]
        if self.forgets():
            yield "forget", learned, ("forget", self.first)


def open_verb(learner: Learner, deed: Deed) -> Steps:
    return learner.learn(deed[1]) if deed[0] == "learn" else learner.forget(deed[1])


def drain(steps: Steps, n: int | None = None) -> list[Progress]:
    """Take all steps, or the first n; the generator stays open then."""
    taken: list[Progress] = []
    while n is None or len(taken) < n:
        progress = next(steps, None)
        if progress is None:
            break
        taken.append(progress)
    return taken


def demand(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def demand_same(first: Any, second: Any, message: str, ordered: bool = False) -> None:
    difference = state_difference(first, second, ordered)
    demand(not difference, f"{message}: {difference}.")


def state_difference(first: Any, second: Any, ordered: bool = False, path: str = "state") -> str:
    """Where two states differ first, in words; "" where they agree bit for bit.

    Args:
        ordered: the keys of every dict must stand in one order too.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _tensor_difference(first.detach().cpu(), second.detach().cpu(), path)
    if isinstance(first, dict) and isinstance(second, dict):
        keys, others = list(first), list(second)
        if (keys != others) if ordered else (set(keys) != set(others)):
            return f"{path} has the keys {keys} here and {others} there"
        return next(filter(None, (state_difference(first[key], second[key], ordered, f"{path}.{key}") for key in keys)), "")
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return f"{path} has {len(first)} items here and {len(second)} there"
        pairs = enumerate(zip(first, second, strict=True))
        return next(filter(None, (state_difference(a, b, ordered, f"{path}[{i}]") for i, (a, b) in pairs)), "")
    same = type(first) is type(second) and (first == second or (first != first and second != second))
    return "" if same else f"{path} is {first!r:.80} here and {second!r:.80} there"


def _tensor_difference(first: Tensor, second: Tensor, path: str) -> str:
    if first.dtype != second.dtype or first.shape != second.shape:
        return f"{path} is {first.dtype} {tuple(first.shape)} here and {second.dtype} {tuple(second.shape)} there"
    differs = (first != second) & ~((first != first) & (second != second))
    return f"{path} differs in {int(differs.sum())} of {differs.numel()} numbers" if bool(differs.any()) else ""


def global_rng() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what must stay untouched
    return {"torch": torch.default_generator.get_state(), "numpy": repr(numpy), "random": random.getstate(), "numpy_state": numpy}


def set_global_rng(state: dict[str, Any]) -> None:
    torch.default_generator.set_state(state["torch"])
    np.random.set_state(state["numpy_state"])  # noqa: NPY002 - puts back what was found
    random.setstate(state["random"])


def stir_global_rng() -> None:
    """Bring every global generator to a state that it did not have before."""
    torch.rand(1), random.random(), np.random.random()  # noqa: NPY002 - the global ones are meant


def demand_rng(before: dict[str, Any], where: str) -> None:
    now = global_rng()
    for name, same in (
        ("torch", torch.equal(before["torch"], now["torch"])),
        ("numpy", before["numpy"] == now["numpy"]),
        ("random", before["random"] == now["random"]),
    ):
        demand(same, f"{where} changed {name}'s global generator; draw from remanence.keys.generator(seed, verb, task, step).")


def tables(task: Task) -> list[Tensor]:
    sets = [data for data in (task.train, task.valid, task.test) if data is not None]
    return [tensor for data in sets for tensor in (data.inputs, data.targets, data.ids)]


def with_rows(task: Task, name: str, rows: Sequence[int] = ()) -> Task:
    assert task.train is not None
    return replace(task, name=name, train=task.train.select(torch.tensor(rows, dtype=torch.int64)))
