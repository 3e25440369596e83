"""A Continual HyperTransformer in the harness: every task rewrites one small CNN and leaves a mean per class behind.

    learner = ContinualHyperTransformerLearner("cht", keep_supports=True)
    fit(learner, first), fit(learner, second)
    fit(learner, first, "forget")                        # equals having learned the second alone

Axes: N images, C channels, H, W pixels, n ways, P classes held, D embedding width.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.generated._continual_held import Held, Lesson, counts_of
from remanence.generated._learner_model import count, nothing_known, read_model, require_images, require_same_model, require_task
from remanence.generated.continual import ContinualHyperTransformer, UnknownTask
from remanence.generated.files import model_fingerprint
from remanence.generated.heads import prototype_layer
from remanence.generated.task_weights import TaskWeights
from remanence.keys import generator
from remanence.learner import Cursor, Footprint, Learner, Prediction, Steps, require_learnable
from remanence.parts import TaskBook, run_verb
from remanence.state import State, state_bytes
from remanence.task import Data, Task

_FORGETTING = ("exact", "prototypes")
_ON_REPEAT = ("merge", "replace", "error")


class ContinualHyperTransformerLearner(Learner):
    """Each task is read in one pass that rewrites the CNN all tasks share; of a class one mean stays, in the embedding of its time.

    Without a task's name the nearest of all means answers; with it, the nearest of that task's. A name that was never learned is
    answered as none: probes ask about tasks that are still to come.

    Forgetting, in the three forms there are:

    - `keep_supports=True` goes back to the state before the task and replays what came after it: exact, as if the task (or these
      classes, or these examples of it) had never been learned, bit for bit on the same machine and number of threads. Each task then
      holds its support set and a copy of the state before it, which grows by one mean a class.
    - `forgetting="prototypes"` only drops the class means. The classes are never answered again, but their traces stay in the
      weights: partial. When nothing else is left the learner begins anew, which is exact.
    - By default `forget` refuses.

    Args:
        model: folder of a ContinualHyperTransformer, or a model; copied, never trained, and no part of the state.
        keep_supports: hold the support sets, for exact forgetting.
        forgetting: "exact" or "prototypes".
        on_repeat: what becomes of a class that is held when it comes again, under whatever task. "merge": its mean goes on, weighted by
            counts; "replace": it begins anew, and belongs to the newest task; "error".
        batch_size: examples per step; by default a task's whole train set is one support set.
        seed: key of the order in which mini-batches are drawn.
        device: where the weights are written and asked.

    Raises:
        SettingError: a setting is unknown or contradicts another, or the model is of another kind.

    Source: Vladymyrov, Zhmoginov and Sandler 2023 (arXiv 2301.04584). ours: replay and the treatment of repeated classes.
    """

    store = "generated"

    def __init__(
        self, model: str | Path | ContinualHyperTransformer, keep_supports: bool = False,
        forgetting: Literal["exact", "prototypes"] = "exact", on_repeat: Literal["merge", "replace", "error"] = "merge",
        batch_size: int | None = None, seed: int = 0, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        for name, value, known in (("forgetting", forgetting, _FORGETTING), ("on_repeat", on_repeat, _ON_REPEAT)):
            if value not in known:
                raise SettingError(f"ContinualHyperTransformerLearner: {name}={value!r} is unknown; give one of {', '.join(known)}.")
        if keep_supports and forgetting == "prototypes":
            raise SettingError("keep_supports=True forgets exactly; leave forgetting='prototypes' away, or keep no supports.")
        if batch_size is not None and batch_size < 1:
            raise SettingError(f"ContinualHyperTransformerLearner: batch_size={batch_size} must be above 0.")
        self.keep_supports, self.forgetting, self.on_repeat, self.batch_size = keep_supports, forgetting, on_repeat, batch_size
        self.seed, self.device = seed, torch.device(device)
        self.model = _continual(read_model(model, self.device))
        self._fingerprint = model_fingerprint(self.model)
        self.cursor = Cursor()
        self._held, self._lessons = self._blank(), list[Lesson]()

    def _blank(self) -> Held:
        return Held(self.model.init_state())

    # --- learning ----------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> Steps:
        data = require_task(self, self.model, task)
        return run_verb(
            self.cursor,
            ("learn", task.name, self._n_steps(data)),
            lambda: self._require_new(task),
            lambda step: self._learn_batch(task.name, data, step),
            lambda: None,
        )

    def _n_steps(self, data: Data) -> int:
        return -(-len(data) // (self.batch_size or max(1, len(data))))

    def _require_new(self, task: Task) -> None:
        known = sorted(set(task.classes) & set(self._held.labels))
        if self.on_repeat == "error" and known:
            raise DataError(f"task '{task.name}': {len(known)} classes are held already (first three: {known[:3]}); use on_repeat='merge'.")

    def _learn_batch(self, name: str, data: Data, step: int) -> tuple[None, int]:
        before = self._held
        self._held = self._advanced(before, name, data, step)
        if self.keep_supports:
            if step == 0:
                self._lessons.append(Lesson(name, data.select(torch.arange(len(data))), before, 0))
            self._lessons[-1] = replace(self._lessons[-1], n_steps=step + 1)
        return None, len(self._rows(name, data, step))

    def _rows(self, name: str, data: Data, step: int) -> Tensor:
        """The rows of a step: all of them, or the next few of an order drawn for this task."""
        if self.batch_size is None or data.ordered:
            order = torch.arange(len(data))
        else:
            order = torch.randperm(len(data), generator=generator(self.seed, "learn", name))
        size = self.batch_size or len(data)
        return order[step * size : (step + 1) * size]

    @torch.no_grad()
    def _advanced(self, held: Held, name: str, data: Data, step: int) -> Held:
        """What is held one step on."""
        if step == 0:
            held = self._made_room(held, name, set(data.targets.tolist()))
        batch = data.select(self._rows(name, data, step))
        classes, slot = torch.unique(batch.targets, return_inverse=True)
        labels = classes.tolist()
        slots = torch.tensor([held.labels.index(label) if label in held.labels else -1 for label in labels], device=self.device)
        state = self.model.step(held.state, batch.inputs[None].to(self.device), slot[None].to(self.device), slots=slots)
        book = held.book()
        book.add(name, batch)
        return Held(state, (*held.labels, *(label for label in labels if label not in held.labels)), counts_of(book))

    def _made_room(self, held: Held, name: str, labels: set[int]) -> Held:
        """Before a task's first step: its classes are counted anew, and where they are to be replaced their means go."""
        if self.on_repeat == "replace":
            return held.without(labels)
        own = {label: n for label, n in held.counts.get(name, {}).items() if label not in labels}
        others = {key: counts for key, counts in held.counts.items() if key != name}
        return replace(held, counts=others | ({name: own} if own else {}))

    # --- forgetting --------------------------------------------------------------------------------------------

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        """Take a task, or a part of it, out again; see the class for what that means.

        Raises:
            DataError: nothing of the task was learned, or none of these examples.
            ErasureNotSupported: no supports are kept and `forgetting` is not "prototypes", or a mean would have to be divided.
        """
        data = require_learnable(self, task)
        return run_verb(
            self.cursor,
            ("forget", task.name, 1),
            lambda: self._require_forgettable(task, data),
            lambda step: (None, self._replay(task, data) if self.keep_supports else self._drop_means(task)),
            lambda: None,
        )

    def _require_forgettable(self, task: Task, data: Data) -> None:
        book = self._book()
        book.require(task)
        if self.keep_supports:
            if not any(lesson.name == book.owner(task) and lesson.holds(data) for lesson in self._lessons):
                raise DataError(f"none of these {len(data)} examples of '{task.name}' was learned; give the ones that were.")
        elif self.forgetting == "exact":
            raise ErasureNotSupported(
                f"'{task.name}' left its traces in weights that later tasks rest on. Learn with keep_supports=True, which replays what "
                f"came after it and is exact; or say forgetting='prototypes', which drops its class means only."
            )
        else:
            self._require_undivided(task, data)

    def _require_undivided(self, task: Task, data: Data) -> None:
        owner = self._book().owner(task) or ""
        for label, n in count(data.targets).items():
            shares = {name: counts[label] for name, counts in self._held.counts.items() if label in counts}
            if set(shares) - {owner} or shares.get(owner, 0) > n:
                raise ErasureNotSupported(
                    f"class {label} has one mean over {shares} examples, and {n} of '{owner}' shall go; a mean cannot be divided. Forget "
                    f"all that share it, or learn with keep_supports=True."
                )

    def _book(self) -> TaskBook:
        """What can be forgotten: the lessons, where they are kept, else the means."""
        book = self._held.book()
        if self.keep_supports:
            book.load({})
            for lesson in self._lessons:
                book.add(lesson.name, lesson.data)
        return book

    def _drop_means(self, task: Task) -> int:
        held = self._held.without(set(task.classes))
        self._held = held if held.labels else self._blank()
        return 0

    def _replay(self, task: Task, data: Data) -> int:
        """Go back to before the first lesson that shrinks, and take the later ones in again; returns how many examples those have."""
        owner = self._book().owner(task)
        shrinks = [lesson.name == owner and lesson.holds(data) for lesson in self._lessons]
        first = shrinks.index(True)
        held, lessons = self._lessons[first].before, self._lessons[:first]
        n_examples = 0
        for lesson, less in zip(self._lessons[first:], shrinks[first:], strict=True):
            rest = lesson.data.select(~torch.isin(lesson.data.ids, data.ids)) if less else lesson.data
            n_steps = min(lesson.n_steps, self._n_steps(rest))
            lessons += [replace(lesson, data=rest, before=held, n_steps=n_steps)] if n_steps else []
            for step in range(n_steps):
                held = self._advanced(held, lesson.name, rest, step)
            n_examples += len(rest)
        self._held, self._lessons = held, lessons
        return n_examples

    # --- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        require_images(self.model.target, inputs, task or "inputs")
        x = inputs.to(self.device)
        labels = self._asked(task)
        if not labels:
            return nothing_known(x)
        logits = self.model.target.functional(x[None], self._tensors(labels))[0]
        return Prediction(logits, torch.tensor(labels, device=self.device))

    def _asked(self, task: str | None) -> list[int]:
        """The labels in question, ascending."""
        return sorted(self._held.counts.get(task or "", self._held.labels))

    def _tensors(self, labels: list[int]) -> dict[str, Tensor]:
        """The newest CNN with the means of some classes as its last layer."""
        state = self._held.state
        means = state.prototypes[:, [self._held.labels.index(label) for label in labels]]
        weight, bias = prototype_layer(means, self.model.log_scale.exp())
        return state.tensors | {"logits.weight": weight, "logits.bias": bias}

    def export(self, task: str | None = None) -> nn.Module:
        """The newest CNN with the class means as a linear layer: pixels (N, C, H, W) -> logits (N, P), the labels ascending; a copy.

        Raises:
            UnknownTask: nothing was learned, or no task of this name.
        """
        labels = self._asked(task)
        if not labels or (task is not None and task not in self._held.counts):
            known = ", ".join(self._held.counts) or "nothing"
            raise UnknownTask(f"nothing to export for task {task!r}; learned: {known}.")
        return TaskWeights(self.model.target, self._tensors(labels), torch.tensor([len(labels)]), (tuple(map(str, labels)),)).to_module()

    def footprint(self) -> Footprint:
        """A class that several tasks share counts for the first of them."""
        state, left = self._held.state, set(self._held.labels)
        per_class = state_bytes([state.prototypes, state.counts, state.task_of_class]) // max(1, len(left))
        sizes = {name: sum(state_bytes(lesson.saved()) for lesson in self._lessons if lesson.name == name) for name in self._held.counts}
        for name, counts in self._held.counts.items():
            sizes[name] += per_class * len(left & counts.keys())
            left -= counts.keys()
        return Footprint(state_bytes(self.state_dict()) - sum(sizes.values()), sizes)

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        lessons = [lesson.saved() for lesson in self._lessons]
        return {"cursor": self.cursor.state_dict(), "model": self._fingerprint, "held": self._held.saved(), "lessons": lessons}

    def load_state_dict(self, state: State) -> None:
        """Raises StateMismatchError for a state that another model made."""
        require_same_model(state, self._fingerprint)
        self.cursor.load_state_dict(state["cursor"])
        self._held = Held.load(state["held"], self.model, self.device)
        self._lessons = [Lesson.load(lesson, self.model, self.device) for lesson in state["lessons"]]


def _continual(model: nn.Module) -> ContinualHyperTransformer:
    if not isinstance(model, ContinualHyperTransformer):
        raise SettingError("this is a HyperTransformer without recurrence; give it to HyperTransformerLearner, or train a continual one.")
    if model.head != "prototype" or model.target.norm != "group":
        raise SettingError(
            f"a continual learner answers by class means and image by image, this model has head='{model.head}' and "
            f"norm='{model.target.norm}'; train one with head='prototype' and TargetNet(norm='group')."
        )
    return model
