"""What the harness costs per step, beside a hand-written loop that does the same training.

    python benchmarks/harness_overhead.py            # about three minutes on one core
    python benchmarks/harness_overhead.py --pairs 40

Both sides train the demo's backbone (8 x 8 digits, patch 2, width 64, depth 4; batch 32) on all ten classes at once and
end with the same weights, bit for bit. The harness side is `CellRunner` driving `FineTuning`: generator, keyed batches,
progress, tally, finite check, ledger and checkpoints at their default; no probe runs during the
event of the gated row. The hand-written side indexes precomputed permutations, has its targets mapped to columns beforehand,
sets the cosine's rate, and never reads the loss. The model is the same module on both sides: it takes pixels and normalises
them itself, as the deployed one does.

The two take turns in blocks of steps in one process on one thread, A B B A A B ...; every block of the harness holds all
that happens between its first and its last step. A row is the median over pairs of harness time / plain time with a 95 %
bootstrap interval. A checkpoint falls into few blocks, so its time is measured apart and spread over the seconds
between two checkpoints. Exit code 1 when the interval's upper end plus the checkpoint's share reaches 1.03.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.artifact import materialise
from remanence.environment import environment
from remanence.grid import Builder, one_thread
from remanence.learner import Steps
from remanence.parts.hosts import VisionHost
from remanence.parts.learning_rate import warm_cosine
from remanence.probe import Probe
from remanence.probes import Accuracy
from remanence.recipe import read_recipe
from remanence.recipes import recipe_path
from remanence.runner import CHECKPOINT, CellRunner
from remanence.state import save_state, write_whole
from remanence.streams import joint
from remanence.task import Data, Event, Stream, Task
from remanence.weights import FineTuning

LIMIT, BATCH, LR, SEED = 1.03, 32, 1e-3, 0
BLOCK, PROBE_EVERY = 32, 19
GATED = "no probes (gated)"
RESULT = Path(__file__).parent / "results" / "harness_overhead.json"


class PlainLoop:
    """What a competent person writes for this training, one block of steps at a time.

    Args:
        backbone: folder of the ViT.
        head: initial weight (C, D) and bias (C,), so that both sides start alike.
        data: the train table.
        classes: source labels of the head's rows.
        batches: the row numbers of every step.
    """

    def __init__(self, backbone: Path, head: tuple[Tensor, Tensor], data: Data, classes: list[int], batches: list[Tensor]) -> None:
        host = VisionHost.load(backbone)
        self.host, self.head = host, nn.Linear(host.width, len(classes))
        self.head.load_state_dict({"weight": head[0], "bias": head[1]})
        self.images = data.inputs
        self.columns = torch.searchsorted(torch.tensor(classes), data.targets)
        self.batches, self.step = batches, 0
        self.optimizer = torch.optim.AdamW([*host.vit.parameters(), *self.head.parameters()], lr=LR, weight_decay=0.0, fused=True)

    def run(self, n_steps: int) -> None:
        """The next steps, or what is left of them."""
        last = min(self.step + n_steps, len(self.batches))
        for step in range(self.step, last):
            for group in self.optimizer.param_groups:
                group["lr"] = LR * warm_cosine(step, len(self.batches))
            rows = self.batches[step]
            loss = F.cross_entropy(self.head(self.host(self.images[rows])), self.columns[rows])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.step = last

    def weights(self) -> list[Tensor]:
        """Backbone first, then the head."""
        return [*self.host.vit.parameters(), *self.head.parameters()]


@dataclass
class Turns:
    """Blocks of two sides in the order A B B A, timed one by one.

    Args:
        block: steps per block.
        n_pairs: how many pairs count; two before them warm up, what is left after them is not timed.
        other: runs a block of the other side.
    """

    block: int
    n_pairs: int
    other: Callable[[], None]
    ours_seconds: list[float] = field(default_factory=list)
    other_seconds: list[float] = field(default_factory=list)

    def take(self, steps: Steps) -> Steps:
        """`steps` with a pause after every block; a pause of odd number runs two blocks of the other side, others none."""
        start, n_blocks = time.perf_counter(), 0
        for progress in steps:
            yield progress
            if progress.step % self.block == 0:
                self.ours_seconds.append(time.perf_counter() - start)
                n_blocks += 1
                if n_blocks % 2:
                    self._run_other()
                    self._run_other()
                start = time.perf_counter()

    def _run_other(self) -> None:
        start = time.perf_counter()
        self.other()
        self.other_seconds.append(time.perf_counter() - start)

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of our blocks and of the other side's, pair by pair."""
        ours, other = (np.array(seconds[2 : 2 + self.n_pairs]) for seconds in (self.ours_seconds, self.other_seconds))
        return ours, other


class Paused(FineTuning):
    """Fine-tuning that hands over to the hand-written loop between its blocks."""

    turns: Turns | None = None

    def learn(self, task: Task) -> Steps:
        steps = super().learn(task)
        return steps if self.turns is None else self.turns.take(steps)


class OneTask(Stream):
    """The first event of another stream."""

    def __init__(self, stream: Stream) -> None:
        self.name, self._stream = stream.name, stream

    def __len__(self) -> int:
        return 1

    def event(self, index: int) -> Event:
        return self._stream[0]


@dataclass(frozen=True)
class Race:
    """What both sides have in common."""

    backbone: Path
    stream: Stream
    block: int
    n_pairs: int

    @property
    def task(self) -> Task:
        return self.stream[0].task

    def learner(self) -> Paused:
        """Trains for at least as many steps as are timed."""
        assert self.task.train is not None
        epochs = -(-(self.n_pairs + 2) * self.block * BATCH // len(self.task.train))
        return Paused(self.backbone, epochs=epochs, batch_size=BATCH, lr=LR, seed=SEED)

    def plain(self) -> PlainLoop:
        """The hand-written side, from the same start and over the same batches."""
        data, start = self.task.train, self.learner()
        assert data is not None
        start.head.grow(self.task.classes)
        n_steps = data.steps(start.epochs, BATCH)
        batches = [data.rows(step, BATCH, SEED, "learn", self.task.name) for step in range(n_steps)]
        return PlainLoop(self.backbone, (start.head.weight, start.head.bias), data, start.head.classes, batches)


def race(common: Race, probes: Sequence[Probe]) -> tuple[Turns, bool, float]:
    """Run both sides once; returns the turns, whether the weights agree, and the seconds of one checkpoint."""
    plain = common.plain()
    turns = Turns(common.block, common.n_pairs, lambda: plain.run(common.block))
    made: list[Paused] = []

    def make() -> Paused:
        made.append(common.learner())
        made[-1].turns = turns
        return made[-1]

    with tempfile.TemporaryDirectory() as folder:
        runner = CellRunner(common.stream, make, probes, Path(folder))
        runner.run()
        plain.run(len(plain.batches) - plain.step)
        checkpoint = _checkpoint_seconds(runner, Path(folder) / CHECKPOINT)
    ours = [*made[0].host.vit.parameters(), made[0].head.weight, made[0].head.bias]
    return turns, all(map(torch.equal, ours, plain.weights())), checkpoint


def _checkpoint_seconds(runner: CellRunner, path: Path) -> float:
    """Median time of writing what the runner writes; with the moments that a running event has beside the weights."""
    state = runner.learner.state_dict()
    triple = {"a": state, "b": {"b": state["backbone"]}, "c": {"c": state["backbone"]}}
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        save_state(path, triple)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def bootstrap(ratios: np.ndarray, n: int = 10_000) -> tuple[float, float, float]:
    """Median and its 95 % interval over resampled pairs."""
    draws = np.random.default_rng(SEED).choice(ratios, (n, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def measure(common: Race, probes: Sequence[Probe]) -> dict[str, Any]:
    """One row of the table."""
    turns, is_equal, checkpoint = race(common, probes)
    ours, plain = turns.counted()
    median, low, high = bootstrap(ours / plain)
    share = checkpoint / CellRunner.checkpoint_seconds
    return {
        "pairs": len(ours), "block_steps": common.block,
        "plain_ms_per_step": 1e3 * float(np.median(plain)) / common.block,
        "harness_ms_per_step": 1e3 * float(np.median(ours)) / common.block,
        "ratio": median, "ratio_low": low, "ratio_high": high, "ratio_of_totals": float(ours.sum() / plain.sum()),
        "checkpoint_ms": 1e3 * checkpoint, "checkpoint_share": share, "bound": high + share, "same_weights": is_equal,
    }  # fmt: skip


def common_ground(block: int, n_pairs: int) -> Race:
    """The demo's backbone, and all classes of its stream as one task."""
    recipe = read_recipe(recipe_path("digits"))
    builder = Builder(recipe, {})
    backbone = materialise(builder.artifact("backbone"))
    return Race(backbone, OneTask(joint(builder.stream("split", SEED))), block, n_pairs)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 0 when the overhead is below the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=160, help="pairs of blocks of the gated row")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    options = parser.parse_args(arguments)
    with one_thread():
        rows = {
            GATED: measure(common_ground(BLOCK, options.pairs), []),
            f"accuracy every {PROBE_EVERY} steps": measure(common_ground(PROBE_EVERY, options.pairs // 2), [Accuracy(at=PROBE_EVERY)]),
        }
    gated = rows[GATED]
    passed = gated["same_weights"] and gated["bound"] < LIMIT
    print(f"{'':<26}{'plain ms':>10}{'harness ms':>12}{'ratio':>9}  95 % interval   with checkpoints  same weights")
    for name, row in rows.items():
        print(
            f"{name:<26}{row['plain_ms_per_step']:>10.3f}{row['harness_ms_per_step']:>12.3f}{row['ratio']:>9.4f}"
            f"  {row['ratio_low']:.4f}-{row['ratio_high']:.4f}   < {row['bound']:.4f}          {row['same_weights']}"
        )
    print(f"limit {LIMIT}: {'holds' if passed else 'DOES NOT HOLD'}")
    result = {
        "command": "python benchmarks/harness_overhead.py" + (f" --pairs {options.pairs}" if options.pairs != 160 else ""),
        "seed": SEED, "limit": LIMIT, "passed": passed, "threads": 1, "rows": rows, "environment": environment(),
    }  # fmt: skip
    write_whole(options.out, json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
