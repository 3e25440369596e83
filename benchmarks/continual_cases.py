"""The parts of `continual.py` that need no grid: re-derived metrics, exactness of prototypes, kills, odd streams.

Axes: T tasks, D width.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from remanence.grid import Builder
from remanence.keys import generator
from remanence.learner import fit
from remanence.ledger import Ledger, Row
from remanence.parts import PrototypeHead
from remanence.probes import Accuracy, accuracy_matrix, metrics
from remanence.runner import LEDGER, CellRunner
from remanence.streams import Source
from remanence.task import Event, Stream, Task
from remanence.weights import Prototypes

Values = np.ndarray


@dataclass(frozen=True)
class Gate:
    """One acceptance check: what must hold, what was seen."""

    row: str
    criterion: str
    seen: str
    passed: bool


# --- streams that the library has no use for ---------------------------------------------------------------------


def shuffled(source: Source, order_seed: int) -> Source:
    """The source with the labels of its train rows dealt out anew, another deal a seed; its test rows stay right."""
    rows = (~source.is_test).nonzero().flatten()
    labels = source.labels.clone()
    labels[rows] = labels[rows[torch.randperm(len(rows), generator=generator("shuffled", order_seed))]]
    return replace(source, labels=labels)


class OnValid(Stream):
    """A stream whose tasks are tested on their validation part; its test rows cannot be reached."""

    def __init__(self, stream: Stream) -> None:
        self.name, self.mode, self.task_id_at_test = f"{stream.name}, on valid", stream.mode, stream.task_id_at_test
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def event(self, index: int) -> Event:
        event = self._stream[index]
        return replace(event, task=_on_valid(event.task))


def _on_valid(task: Task) -> Task:
    assert task.valid is not None
    return replace(task, test=task.valid, valid=None, parts=tuple(_on_valid(part) for part in task.parts))


def on_valid(stream: Stream) -> OnValid:
    """`OnValid` for a recipe."""
    return OnValid(stream)


# --- C1: three libraries, three forgettings ----------------------------------------------------------------------


def mammoth_forgetting(rows: list[list[float]]) -> float:
    """aimagelab/mammoth: per old task the best of all evaluations, the last included, minus the last."""
    n = len(rows)
    return sum(max(row[j] for row in rows) - rows[-1][j] for j in range(n - 1)) / (n - 1)


def avalanche_forgetting(rows: list[list[float]]) -> float:
    """ContinualAI/avalanche: per old task its accuracy when it was trained, minus the last."""
    n = len(rows)
    return sum(rows[j][j] - rows[-1][j] for j in range(n - 1)) / (n - 1)


def coda_forgetting(rows: list[list[float]]) -> float:
    """GT-RIPL/CODA-Prompt: at every later task the mean loss of the earlier ones since the task before; then the mean."""
    per_task = [sum(rows[t - 1][i] - rows[t][i] for i in range(t)) / t for t in range(1, len(rows))]
    return sum(per_task) / len(per_task)


HAND = np.array([[0.9, 0.0, 0.0], [0.5, 0.8, 0.0], [0.3, 0.6, 1.0]])
"""By hand: AA (.3+.6+1)/3; forgetting max = first ((.9-.3)+(.8-.6))/2; step (.4 + (.2+.2)/2)/2; FWT (0+0)/2."""
HAND_RESULTS = {
    "average_accuracy": 1.9 / 3,
    "forgetting_max": 0.4,
    "forgetting_first": 0.4,
    "forgetting_step": 0.3,
    "backward_transfer": -0.4,
}
GAIN = np.array([[0.5, 0.1, 0.1], [0.7, 0.6, 0.1], [0.8, 0.2, 0.9]])
"""Task 0 gains: best before the end .7, end .8. By hand: max ((.7-.8)+(.6-.2))/2; first ((.5-.8)+(.6-.2))/2; step (-.2+(-.1+.4)/2)/2."""
GAIN_RESULTS = {
    "average_accuracy": 1.9 / 3,
    "forgetting_max": 0.15,
    "forgetting_first": 0.05,
    "forgetting_step": -0.025,
    "backward_transfer": -0.05,
}


def metric_errors() -> tuple[float, float]:
    """Largest error against the values by hand, and against the peers' formulas on 200 random matrices."""
    by_hand, by_peers = 0.0, 0.0
    for matrix, results in ((HAND, HAND_RESULTS), (GAIN, GAIN_RESULTS)):
        for name, value in results.items():
            by_hand = max(by_hand, abs(getattr(metrics, name)(matrix, np.eye(3, dtype=bool)).value - value))
    draws = np.random.default_rng(0)
    for n in draws.integers(2, 9, 200):
        matrix, learned = draws.random((n, n)), np.eye(n, dtype=bool)
        rows = matrix.tolist()
        ours = [metric(matrix, learned).value for metric in (metrics.forgetting_first, metrics.forgetting_step)]
        by_peers = max(by_peers, *np.abs(np.subtract(ours, [avalanche_forgetting(rows), coda_forgetting(rows)])))
        # mammoth's maximum takes in the last row, so that the two agree where the end is not the best
        matrix[-1, :-1] = np.minimum(matrix[-1, :-1], matrix[:-1, :-1].max(axis=0))
        by_peers = max(by_peers, abs(metrics.forgetting_max(matrix, learned).value - mammoth_forgetting(matrix.tolist())))
    return by_hand, by_peers


def check_metrics() -> Gate:
    """C1."""
    by_hand, by_peers = metric_errors()
    seen = f"largest error {by_hand:.1e} by hand, {by_peers:.1e} against the peers' formulas on 200 matrices"
    return Gate("C1", "metrics equal hand matrices and three peer formulas to 1e-12", seen, max(by_hand, by_peers) < 1e-12)


# --- C3: prototypes ----------------------------------------------------------------------------------------------


def check_prototypes(backbone: Path, tasks: list[Task], n_orders: int = 5) -> list[Gate]:
    """C3: means do not depend on order or batching; forgetting a class equals never having seen it."""
    plain = _means(_taught(backbone, tasks, 64))
    orders = [torch.randperm(len(tasks), generator=generator("tasks", seed)).tolist() for seed in range(n_orders)]
    variants = [
        _means(_taught(backbone, [_mixed(tasks[i], seed) for i in order], size))
        for seed, order in enumerate(orders)
        for size in (1, 7, 64, 1000)
    ]
    moved = max(float((means - plain).abs().max()) for means in variants)
    erased = max(_erasure_error(backbone, tasks, label) for task in tasks for label in task.classes)
    seen = f"{len(variants)} variants, largest difference {moved:.1e}"
    return [
        Gate("C3", "class means agree to 1e-5 over orders and batch sizes", seen, moved < 1e-5),
        Gate("C3", "forget(c) equals never having seen c to 1e-5", f"every class, largest difference {erased:.1e}", erased < 1e-5),
    ]


def _taught(backbone: Path, tasks: list[Task], batch_size: int) -> Prototypes:
    learner = Prototypes(backbone, batch_size=batch_size)
    for task in tasks:
        fit(learner, task)
    return learner


def _means(learner: Prototypes) -> torch.Tensor:
    head: PrototypeHead = learner.head
    return head.means()[1]


def _mixed(task: Task, seed: int) -> Task:
    assert task.train is not None
    return replace(task, train=task.train.select(torch.randperm(len(task.train), generator=generator("rows", seed))))


def _erasure_error(backbone: Path, tasks: list[Task], label: int) -> float:
    learner = _taught(backbone, tasks, 64)
    task = next(task for task in tasks if label in task.classes)
    assert task.train is not None
    fit(learner, task.select(task.train.targets == label), "forget")
    without = [_without(other, label) for other in tasks]
    never = _taught(backbone, [other for other in without if len(other.train or ())], 64)
    labels, others = learner.head.means()[0], never.head.means()[0]
    return float((_means(learner) - _means(never)).abs().max()) if torch.equal(labels, others) else float("inf")


def _without(task: Task, label: int) -> Task:
    assert task.train is not None
    return replace(task, train=task.train.select(task.train.targets != label))


# --- C13: real kills ---------------------------------------------------------------------------------------------

CELL_SEED, CHECKPOINT_SECONDS, GRID = 0, 0.3, 19


def run_cell(builder: Builder, learner: str, folder: Path) -> Ledger:
    """One cell, seed 0, with accuracy read on a grid of steps, saved often."""
    make = lambda: builder.learner(learner, CELL_SEED)  # noqa: E731
    stream = builder.stream("in turn", CELL_SEED)
    runner = CellRunner(stream, make, [Accuracy(at=GRID)], folder, ("C13", "in turn", learner), CELL_SEED, CHECKPOINT_SECONDS)
    return runner.run()


def check_kills(builder: Builder, learner: str, folder: Path, n_kills: int) -> Gate:
    """C13: SIGKILL at random moments, then the same command again, until it is done; against an uninterrupted run."""
    whole = run_cell(builder, learner, folder / "whole")
    rows = list(_killed(learner, folder / "killed", n_kills, len(whole)))
    resumed = run_cell(builder, learner, folder / "killed")
    same_rows = _exact(whole) == _exact(resumed)
    first, second = (accuracy_matrix(ledger.frame()).values for ledger in (whole, resumed))
    passed = len(rows) == n_kills and max(rows) < len(whole) and same_rows and np.array_equal(first, second)
    seen = f"{learner}: killed after {rows} of {len(whole)} rows; A and all {len(_exact(whole))} exact rows equal: {same_rows}"
    return Gate("C13", "kill -9 at random moments, resume: bit-exact A", seen, passed)


def _killed(learner: str, folder: Path, n_kills: int, n_rows: int) -> Iterator[int]:
    """Rows on disk at each kill; a process that was done before its kill yields nothing."""
    chance = random.Random(learner)
    targets = sorted(chance.randrange(1, int(0.7 * n_rows)) for _ in range(n_kills))
    for target in targets:
        process = subprocess.Popen([sys.executable, Path(__file__).with_name("continual.py"), "--cell", learner, str(folder)])
        while process.poll() is None and _n_lines(folder / LEDGER) < target:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            yield _n_lines(folder / LEDGER)


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _exact(ledger: Ledger) -> list[Row]:
    return [row for row in ledger if row.exact]
