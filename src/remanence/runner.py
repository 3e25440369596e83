"""The loop of one cell: stream -> learner -> probes -> ledger; safe against crashes at any moment.

Order of writing is what makes it safe: rows are on disk before the checkpoint that follows them. A cell that died goes
on from its last checkpoint, measures again what lies between, and the ledger skips what it already holds. Since every
random choice is keyed by (seed, verb, task, step), the second measurement equals the first; if not, the ledger says so.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from remanence.errors import CellBusy, ErasureNotSupported, NonFiniteLoss, SettingError, StateMismatchError
from remanence.learner import Learner, Progress, Steps
from remanence.ledger import Ledger, Row
from remanence.probe import Probe, Reading, View
from remanence.state import State, all_finite, copy_state, load_state, save_state
from remanence.task import Stream, Task

CHECKPOINT, LEDGER, LOCK = "checkpoint.safetensors", "ledger.jsonl", "lock"
_LOSSES_HELD = 32

Where = tuple[int, str, tuple[Task, ...]]
"""Index of an event, its verb, its tasks."""


@dataclass
class Tally:
    """What an event has consumed so far."""

    step: int = 0
    n_examples: int = 0
    seconds: float = 0.0
    loss: float | None = None

    def count(self, progress: Progress, seconds: float) -> None:
        if progress.step != self.step + 1:
            raise StateMismatchError(
                f"the learner went on at step {progress.step}, its checkpoint stood at step {self.step}: its state lacks the cursor. "
                f"Keep all that must survive a yield in state_dict() (remanence.learner.Cursor holds the step)."
            )
        self.step, self.n_examples, self.seconds = progress.step, self.n_examples + progress.n_examples, self.seconds + seconds


@dataclass
class CellRunner:
    """One stream, one learner, one seed.

    Args:
        stream: what happens.
        make: builds a learner that has learned nothing; called for the cell's own and for every fork.
        probes: what to read; each one's `at` says when.
        folder: the cell's own; holds ledger, checkpoint and lock.
        names: run, stream and learner as the ledger shall call them.
        seed: of the cell; a column of the ledger.
        checkpoint_seconds: how much work may be lost at most; 0 saves at every step.
        on_event: told (events done, events in all) after every event.
    """

    stream: Stream
    make: Callable[[], Learner]
    probes: Sequence[Probe]
    folder: Path
    names: tuple[str, str, str] = ("", "", "")
    seed: int = 0
    checkpoint_seconds: float = 5.0
    on_event: Callable[[int, int], None] = lambda done, total: None
    _losses: list[tuple[int, Tensor | float]] = field(default_factory=list, init=False)
    _saved_at: float = field(default=0.0, init=False)

    def run(self) -> Ledger:
        """Run to the end, going on where an earlier process stopped; returns the ledger.

        Raises:
            CellBusy: another process runs this cell.
            NonFiniteLoss: the loss, or at the end the state, became NaN or infinite; the checkpoint holds the last good state.
            NotDeterministic: a repeated measurement differs from the ledger's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                return self._run()
        except Timeout as error:
            raise CellBusy(f"another process runs {self.folder}. Wait for it, or give another run folder.") from error

    def _run(self) -> Ledger:
        self.ledger, self.learner = Ledger(self.folder / LEDGER), self.make()
        self._base = copy_state(self.learner.state_dict()) if self.stream.mode == "independent" else {}
        self._losses, self._saved_at = [], time.monotonic()
        first, tally = 0, Tally()
        path = self.folder / CHECKPOINT
        if path.exists():
            saved = load_state(path)
            first, tally = saved["event"], Tally(**saved["tally"])
            if first < len(self.stream) or tally.step:
                self.learner.load_state_dict(saved["learner"])
        else:
            # independent tasks have no list of subjects: what the first ones get unlearned is the baseline
            first_tasks = next(self._groups(0), (0, ()))[1] if self.stream.mode == "independent" else ()
            self._probe((-1, "", first_tasks), None)
        for index, tasks in self._groups(first):
            self._run_event(index, tasks, tally)
            tally = Tally()
            self._save(index + len(tasks), tally, force=index + len(tasks) == len(self.stream))
            self.on_event(index + len(tasks), len(self.stream))
        return self.ledger

    def _groups(self, first: int) -> Iterator[tuple[int, tuple[Task, ...]]]:
        """Events from `first` on; of an independent stream up to `n_parallel` learn events at once."""
        index = first
        size = self.learner.n_parallel if self.stream.mode == "independent" else 1
        while index < len(self.stream):
            event = self.stream[index]
            tasks = [event.task]
            while len(tasks) < size and index + len(tasks) < len(self.stream) and event.verb == "learn":
                following = self.stream[index + len(tasks)]
                if following.verb != "learn":
                    break
                tasks.append(following.task)
            yield index, tuple(tasks)
            index += len(tasks)

    # --- one event ---------------------------------------------------------------------------------------------

    def _run_event(self, index: int, tasks: tuple[Task, ...], tally: Tally) -> None:
        verb = self.stream[index].verb
        if tally.step == 0 and verb == "learn" and self.stream.mode == "independent":
            self.learner.load_state_dict(copy_state(self._base))
        refusal, where = "", (index, verb, tasks)
        watching = [probe for probe in self.probes if verb in probe.verbs]
        try:
            for progress in self._timed(self._open(index, verb, tasks), tally):
                self._hold(progress, where, tally)
                if watching and any(probe.due(progress.step) for probe in watching):
                    self._check_finite(where, tally)
                    self._probe(where, progress.step)
                self._save(index, tally, where)
        except ErasureNotSupported as error:
            refusal = str(error)
        self._check_finite(where, tally)
        self._write(self._summary(tasks, verb, tally, refusal), "run", where, None)
        self._probe(where, None)

    def _open(self, index: int, verb: str, tasks: tuple[Task, ...]) -> Steps:
        if verb == "forget":
            return self.learner.forget(tasks[0], self.stream[index].retain)
        return self.learner.learn_many(tasks) if self.stream.mode == "independent" else self.learner.learn(tasks[0])

    def _timed(self, steps: Steps, tally: Tally) -> Iterator[Progress]:
        """Count steps, and the seconds spent inside the learner only."""
        while True:
            start = time.perf_counter()
            progress = next(steps, None)
            seconds = time.perf_counter() - start
            if progress is None:
                tally.seconds += seconds
                return
            tally.count(progress, seconds)
            yield progress

    def _summary(self, tasks: tuple[Task, ...], verb: str, tally: Tally, refusal: str) -> Iterator[Reading]:
        if verb == "learn":
            for leaf in (leaf for task in tasks for leaf in task.leaves):
                yield Reading(leaf.name, "n_train", len(leaf.train or ()), "examples")
        else:
            yield Reading("", "erasure_supported", 0.0 if refusal else 1.0, "1", note=refusal)
        yield Reading("", "steps", tally.step, "steps")
        yield Reading("", "examples", tally.n_examples, "examples")
        yield Reading("", "seconds", tally.seconds, "seconds", exact=False)
        yield Reading("", "peak_memory_bytes", _peak_memory_bytes(), "bytes", exact=False, note="of the process so far")
        yield Reading("", "loss", tally.loss, "nats", note="" if tally.loss is not None else "the mechanism reports no loss")

    # --- loss --------------------------------------------------------------------------------------------------

    def _hold(self, progress: Progress, where: Where, tally: Tally) -> None:
        """Keep the loss unread; a device is waited for once in many steps only."""
        if progress.loss is not None:
            self._losses.append((progress.step, progress.loss))
            if len(self._losses) >= _LOSSES_HELD:
                self._check_finite(where, tally)

    def _check_finite(self, where: Where, tally: Tally) -> None:
        """Read the held losses; the last one goes into the tally.

        Raises:
            NonFiniteLoss: one is NaN or infinite; it stands in the ledger by then.
        """
        if not self._losses:
            return
        losses = torch.stack([torch.as_tensor(loss).float() for _, loss in self._losses])
        steps, self._losses = [step for step, _ in self._losses], []
        if bool(losses.isfinite().all()):
            tally.loss = float(losses[-1])
            return
        bad = int((~losses.isfinite()).nonzero()[0])
        message = f"the loss is {float(losses[bad])} at step {steps[bad]} of event {where[0]} ({where[1]} '{where[2][0].name}')"
        self._write([Reading("", "loss", None, "nats", note=message)], "run", where, steps[bad])
        raise NonFiniteLoss(f"{message}; the last good state is kept in {self.folder / CHECKPOINT}. Lower the learning rate.")

    # --- reading -----------------------------------------------------------------------------------------------

    @staticmethod
    def _is_due(probe: Probe, verb: str, step: int | None) -> bool:
        return verb in probe.verbs and (step is None or probe.due(step))

    def _probe(self, where: Where, step: int | None) -> None:
        for probe in self.probes:
            if self._is_due(probe, where[1], step):
                self._write(probe(View(self.learner, self.stream, *where, self.make)), probe.name, where, step)

    def _write(self, readings: Iterable[Reading], probe: str, where: Where, step: int | None) -> None:
        index, verb, tasks = where
        run, stream, learner = self.names
        task = "" if index < 0 else tasks[0].name if len(tasks) == 1 else f"{tasks[0].name} ... {tasks[-1].name}"
        place: dict[str, Any] = {"run": run, "stream": stream, "learner": learner, "store": self.learner.store, "seed": self.seed}
        place |= {"event": index, "verb": verb, "task": task, "step": step, "probe": probe}
        self.ledger.append(Row(**place, **vars(reading)) for reading in readings)

    # --- saving ------------------------------------------------------------------------------------------------

    def _save(self, event: int, tally: Tally, where: Where | None = None, force: bool = False) -> None:
        if not force and time.monotonic() - self._saved_at < self.checkpoint_seconds:
            return
        if where is not None:
            self._check_finite(where, tally)
        state: State = {"event": event, "tally": vars(tally), "learner": self.learner.state_dict()}
        # a step whose loss was finite may still have broken the weights; such a state never replaces a good one
        if all_finite(state):
            save_state(self.folder / CHECKPOINT, state)
        elif force:
            raise NonFiniteLoss(
                f"the learner's state holds NaN or infinity after the last event, although no loss did; the last good state is kept in "
                f"{self.folder / CHECKPOINT}. Lower the learning rate."
            )
        self._saved_at = time.monotonic()


def is_finished(folder: Path, n_events: int) -> bool:
    """Whether a cell's checkpoint stands behind its last event."""
    path = folder / CHECKPOINT
    return path.exists() and load_state(path)["event"] >= n_events


def require_pair(stream: Stream, learner: Learner, n_tasks: int = 64) -> None:
    """Refuse a learner that cannot take part in a stream, before any work is done.

    `learn` checks its task when called, so that opening and closing it is the check.

    Args:
        n_tasks: how many of the first events are tried.

    Raises:
        SettingError: the learner needs task names that the stream withholds, or cannot give this kind of answer.
        DataError: a task does not fit the learner (image size, no train set).
    """
    if learner.needs_task_id and not stream.task_id_at_test:
        raise SettingError(
            f"{type(learner).__name__} needs to be told the task's name, stream '{stream.name}' withholds it. "
            f"Set task_id_at_test: true on the stream, or choose a learner that finds the task by itself."
        )
    for event in stream[:n_tasks]:
        if event.verb == "learn":
            learner.learn(event.task).close()


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
