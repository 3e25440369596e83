"""A HyperTransformer in the harness: learning is one forward pass, forgetting is dropping what the pass wrote.

    learner = HyperTransformerLearner("ht")              # a folder of `remanence meta-train`, or a model
    fit(learner, task)
    learner.predict(images, "oaks"), learner.export("oaks")

Axes: T tasks, B tasks of a batch, S support samples, N images, C channels, H, W pixels, n ways, P classes held, D embedding width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.generated._learner_model import (
    Written,
    best_of,
    count,
    nothing_known,
    padded,
    read_model,
    require_images,
    require_same_model,
    require_task,
    to_ways,
)
from remanence.generated.files import model_fingerprint
from remanence.generated.heads import linear
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.task_weights import TaskWeights
from remanence.learner import Cursor, Footprint, Learner, Prediction, Steps, require_learnable
from remanence.parts import TaskBook, run_verb
from remanence.state import State, copy_state, state_bytes
from remanence.task import Data, Task

_IMAGES_AT_ONCE = 1024
"""Of all tasks together: beyond it the activations leave the cache."""


class HyperTransformerLearner(Learner):
    """One pass of a meta-trained HyperTransformer writes a small CNN for every task, by itself; its tensors are all that is held.

    Answers are inductive: a "batch" norm uses the statistics of the task's support set, so that each image is answered by itself.
    Told the task's name, that task's CNN answers. Without it, or with a name that was never learned, all CNNs answer and the best
    logit counts: with class means in the head logits are then minus scaled squared distances, each in its own CNN's embedding, which
    compare across tasks; with head="generated" they are plain logits, which nothing ever made comparable.

    `forget` of a task is exact: what stays equals, bit for bit, a learner that never learned it. With `keep_supports` so is forgetting
    classes or examples of a task: the CNN is written anew without them. Meta-training is never forgotten. A task that comes again
    replaces what was held of it.

    Args:
        model: folder of a HyperTransformer, or a model; copied, never trained, and no part of the state.
        keep_supports: hold the support sets too.
        n_parallel: most tasks that `learn_many` takes in one pass.
        seed: unused by the mechanism, which draws nothing.
        device: where CNNs are written and asked.

    Raises:
        SettingError: n_parallel is below 1.

    Source: Zhmoginov, Sandler and Vladymyrov 2022 (arXiv 2201.04182).
    """

    store = "generated"

    def __init__(
        self, model: str | Path | HyperTransformer, keep_supports: bool = False, n_parallel: int = 64, seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        if n_parallel < 1:
            raise SettingError(f"HyperTransformerLearner: n_parallel={n_parallel} must be above 0.")
        self.keep_supports, self.n_parallel, self.seed, self.device = keep_supports, n_parallel, seed, torch.device(device)
        self.model = read_model(model, self.device)
        self._fingerprint = model_fingerprint(self.model)
        self.cursor = Cursor()
        self._tasks: dict[str, Written] = {}

    # --- learning ----------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> Steps:
        return self.learn_many([task])

    def learn_many(self, tasks: Sequence[Task]) -> Steps:
        """Write the CNNs of up to `n_parallel` tasks, of any ways and shots, in one pass.

        Raises:
            SettingError: no task, or more than `n_parallel`.
            DataError: two tasks of one name, or a task that does not fit the model.
        """
        if not 1 <= len(tasks) <= self.n_parallel:
            raise SettingError(f"learn_many takes 1 to {self.n_parallel} tasks, got {len(tasks)}; raise n_parallel or give fewer.")
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"tasks of one name cannot be learned at once: {twice[:3]}; give each a name of its own.")
        tables = {task.name: require_task(self, self.model, task) for task in tasks}
        tables = {name: data for name, data in tables.items() if len(data)}
        n_examples = sum(map(len, tables.values()))

        def write(step: int) -> tuple[None, int]:
            written = self._write(tables)
            for name in tables:  # the newest stand last: predict_many counts on it
                self._tasks.pop(name, None)
            self._tasks |= written
            return None, n_examples

        return run_verb(self.cursor, ("learn", "\n".join(names), min(1, len(tables))), lambda: None, write, lambda: None)

    @torch.no_grad()
    def _write(self, tables: dict[str, Data]) -> dict[str, Written]:
        """Task by task what one pass writes for all."""
        x, y, mask = (value.to(self.device) for value in padded(list(tables.values())))
        weights = self.model.generate(x, y, None if mask.all() else mask)
        return {name: self._keep(one, data) for (name, data), one in zip(tables.items(), weights, strict=True)}

    def _keep(self, weights: TaskWeights, data: Data) -> Written:
        ways = int(weights.ways)
        # what all tasks share is the model's, and the slots of larger tasks of the batch are nobody's
        own = {name: weights.tensors[name] for name in self._own_names()}
        own |= {name: own[name][:, :ways] for name in ("logits.weight", "logits.bias")}
        support = data.select(torch.arange(len(data))) if self.keep_supports else None
        return Written(copy_state(own), count(data.targets), support)

    def _own_names(self) -> Iterator[str]:
        """Tensors that differ from task to task."""
        for name in self.model.target.conv_names:
            if name in self.model.written:
                yield from (f"{name}.weight", *((f"{name}.gamma", f"{name}.beta") if self.model.generate_norm else ()))
            if self.model.target.norm == "batch":
                yield from (f"{name}.mean", f"{name}.var")
        yield from ("logits.weight", "logits.bias")

    # --- forgetting --------------------------------------------------------------------------------------------

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        """Drop a task, or with `keep_supports` write its CNN anew without some classes or examples; both are exact.

        Raises:
            DataError: nothing of the task was learned, or none of these examples.
            ErasureNotSupported: a part of a task whose support set is not kept.
        """
        data = require_learnable(self, task)
        whole = self._is_whole(task, data)
        return run_verb(
            self.cursor,
            ("forget", task.name, 0 if whole else 1),
            lambda: self._require_part(task, data),
            lambda step: (None, self._write_without(task, data)),
            lambda: self._drop(task.name) if whole else None,
        )

    def _book(self) -> TaskBook:
        book = TaskBook()
        book.load({name: held.counts for name, held in self._tasks.items()})
        return book

    def _is_whole(self, task: Task, data: Data) -> bool:
        held = self._tasks.get(task.name)
        if held is None:
            return False
        if held.support is not None:
            return bool(torch.isin(held.support.ids, data.ids).all())
        return count(data.targets) == held.counts

    def _require_part(self, task: Task, data: Data) -> None:
        book = self._book()
        book.require(task)
        owner = book.owner(task) or ""
        support = self._tasks[owner].support
        if support is None and not self._is_whole(task, data):
            raise ErasureNotSupported(
                f"of '{owner}', {book.n_examples(owner)} examples were learned and {len(data)} shall go; its CNN can only be written "
                f"anew from a support set, and none is kept. Forget the whole task, or learn with keep_supports=True."
            )
        if support is not None and not torch.isin(support.ids, data.ids).any():
            raise DataError(f"none of these {len(data)} examples is in the support set of '{owner}'; give the ones that were learned.")

    def _write_without(self, task: Task, data: Data) -> int:
        owner = self._book().owner(task) or ""
        support = self._tasks[owner].support
        assert support is not None
        rest = support.select(~torch.isin(support.ids, data.ids))
        self._tasks |= self._write({owner: rest}) if len(rest) else {}
        if not len(rest):
            self._drop(owner)
        return len(rest)

    def _drop(self, name: str) -> None:
        self._tasks.pop(name, None)

    # --- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        require_images(self.model.target, inputs, task or "inputs")
        x = inputs.to(self.device)
        names = [task] if task in self._tasks else list(self._tasks)
        if not names:
            return nothing_known(x)
        if len(names) == 1:
            return Prediction(self._answers(x[None], names)[0], self._labels(names)[0])
        return best_of(self._answers(x.expand(len(names), *x.shape), names, comparable=True), self._labels(names))

    @torch.no_grad()
    def predict_many(self, inputs: Sequence[Tensor], tasks: Sequence[str | None], reader: str = "") -> list[Prediction]:
        """Answer each task's inputs with its own CNN, all in one call.

        Args:
            inputs: of each task, (N, C, H, W); the N may differ.
            tasks: their names; None stands for the task in this place among the len(tasks) newest, the order of `learn_many`.

        Raises:
            DataError: fewer tasks were learned than are asked without a name.
        """
        names = self._fill_in(tasks)
        if not names or any(name not in self._tasks for name in names):
            return [self.predict(batch, name, reader) for batch, name in zip(inputs, names, strict=True)]
        for batch, name in zip(inputs, names, strict=True):
            require_images(self.model.target, batch, name or "")
        known = [name for name in names if name is not None]
        logits = self._answers(pad_sequence(list(inputs), batch_first=True).to(self.device), known)
        return [
            Prediction(answer[: len(batch), : len(labels)], labels)
            for answer, batch, labels in zip(logits, inputs, self._labels(known), strict=True)
        ]

    def _fill_in(self, tasks: Sequence[str | None]) -> list[str | None]:
        newest = list(self._tasks)[-len(tasks) :]
        if None not in tasks or not newest:
            return list(tasks)
        if len(newest) < len(tasks):
            raise DataError(
                f"{len(tasks)} tasks are asked about, some without a name, and {len(newest)} were learned; "
                f"name them all, or ask in the order of learn_many."
            )
        return [place if name is None else name for name, place in zip(tasks, newest, strict=True)]

    def _labels(self, names: Sequence[str]) -> list[Tensor]:
        return [torch.tensor(self._tasks[name].classes, dtype=torch.int64, device=self.device) for name in names]

    def _answers(self, x: Tensor, names: Sequence[str], comparable: bool = False) -> Tensor:
        """Images (T, N, C, H, W) -> logits (T, N, n), -inf in slots that a task does not have; few images at a time."""
        n_ways = max(len(self._tasks[name].counts) for name in names)
        if not x.shape[1]:
            return x.new_empty(len(x), 0, n_ways)
        columns = []
        for images in torch.split(x, _IMAGES_AT_ONCE, 1):
            size = max(1, _IMAGES_AT_ONCE // images.shape[1])
            chunks = [(images[first : first + size], names[first : first + size]) for first in range(0, len(names), size)]
            columns.append(torch.cat([self._answer(part, some, n_ways, comparable) for part, some in chunks]))
        return torch.cat(columns, 1)

    def _answer(self, x: Tensor, names: Sequence[str], n_ways: int, comparable: bool) -> Tensor:
        tensors = self._stacked(names, n_ways)
        embeddings = self.model.target.embed(x, tensors, "support")
        logits = linear(embeddings, tensors)
        if comparable and self.model.head != "generated":
            logits = logits - self.model.log_scale.exp() * embeddings.square().sum(-1, keepdim=True)
        return logits

    def _stacked(self, names: Sequence[str], n_ways: int) -> dict[str, Tensor]:
        """The CNNs of some tasks as one batch, what they share included."""
        written = [self._tasks[name].tensors for name in names]
        own = {key: torch.cat([to_ways(key, tensors[key], n_ways) for tensors in written]) for key in self._own_names()}
        model = self.model
        shared: dict[str, Any] = {f"{name}.weight": kernel for name, kernel in model.kernels.items()}
        for name in model.target.conv_names:
            shared |= {f"{name}.gamma": model.gamma[name].expand(len(names), -1), f"{name}.beta": model.beta[name].expand(len(names), -1)}
        return shared | own

    def export(self, task: str | None = None) -> nn.Module:
        """The task's CNN as a plain module: pixels (N, C, H, W) -> logits (N, n), the labels ascending; a copy.

        Raises:
            DataError: no such task, or several were learned and none is named.
        """
        name = next(iter(self._tasks)) if task is None and len(self._tasks) == 1 else task
        if name not in self._tasks:
            raise DataError(f"export: task {task!r} has no CNN; name one of: {', '.join(self._tasks) or 'nothing was learned'}.")
        held = self._tasks[name]
        names = (tuple(map(str, held.classes)),)
        tensors = self._stacked([name], len(held.classes))
        tensors |= {f"{layer}.weight": kernel[None] for layer, kernel in self.model.kernels.items()}
        return TaskWeights(self.model.target, tensors, torch.tensor([len(held.classes)]), names).to_module()

    def footprint(self) -> Footprint:
        return Footprint(shared_bytes=0, task_bytes={name: state_bytes(held.state()) for name, held in self._tasks.items()})

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        tasks = {name: held.state() for name, held in self._tasks.items()}
        return {"cursor": self.cursor.state_dict(), "model": self._fingerprint, "tasks": tasks}

    def load_state_dict(self, state: State) -> None:
        """Raises StateMismatchError for a state that another model made."""
        require_same_model(state, self._fingerprint)
        self.cursor.load_state_dict(state["cursor"])
        self._tasks = {name: self._loaded(copy_state(held)) for name, held in state["tasks"].items()}

    def _loaded(self, held: State) -> Written:
        tensors = {name: value.to(self.device) for name, value in held["tensors"].items()}
        counts = {int(label): count for label, count in held["counts"].items()}
        return Written(tensors, counts, None if held["support"] is None else Data(**held["support"]))
