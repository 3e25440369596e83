"""The parts of `memory_tokens.py` that train: data, backbones, arms, four learning rates each, one job at a time.

Axes: N images, C classes of a task.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from continual_cases import shuffled
from torch import nn

from remanence.artifact import materialise
from remanence.keys import generator
from remanence.learner import Learner, fit
from remanence.parts import PretrainedViT
from remanence.streams import Source, digits, fashion_mnist, omniglot, split_classes, turned
from remanence.task import Data, Task
from remanence.tokens import MemoryTokens, VPTDeep
from remanence.weights import FineTuning, LoRA

BATCH, STEPS, TUNING_SEED = 64, 300, 100
RATES, FULL_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-3, 3e-3)
ALPHABETS = ("Greek", "Hebrew", "Korean", "Japanese_(hiragana)", "Japanese_(katakana)", "Cyrillic", "Armenian", "Bengali")
EVALUATED = ("Angelic", "Tengwar")
VALID_SHARE = 0.2


class InitialisedMemory(MemoryTokens):
    """Memory tokens with another start (M9): where memory enters, and what the class token begins as.

    Args:
        norm: "pre" or "post"; see `TaskMemory`.
        token: "copy" of the backbone's class token, or N(0, `spread`^2).
    """

    def __init__(self, *args: Any, norm: Literal["pre", "post"] = "pre", spread: float | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.norm, self.spread = norm, spread

    def _attach(self, task: str, classes: list[int]) -> None:
        made = self.memory.add_task(task, classes, self.tokens, norm=self.norm, seed=self.seed)
        if self.spread is not None:
            assert made.class_token is not None
            draws = torch.randn(self.memory.view.width, generator=generator(self.seed, "class token", task))
            with torch.no_grad():
                made.class_token.copy_(self.spread * draws)


Arm = tuple[type[Learner], dict[str, Any]]
ARMS: dict[str, Arm] = {
    "head": (MemoryTokens, {"mode": "head"}),
    "head + class token": (MemoryTokens, {"mode": "class"}),
    "memory M=1": (MemoryTokens, {"tokens": 1}),
    "memory M=5": (MemoryTokens, {"tokens": 5}),
    "memory M=20": (MemoryTokens, {"tokens": 20}),
    "memory M=5, input only": (MemoryTokens, {"tokens": 5, "mode": "input"}),
    "VPT-deep M=5": (VPTDeep, {"tokens": 5}),
    "LoRA rank 1": (LoRA, {"rank": 1}),
    "full fine-tuning": (FineTuning, {}),
}
SHORT = ("head", "head + class token", "memory M=5", "VPT-deep M=5", "LoRA rank 1", "full fine-tuning")
STARTS: dict[str, Arm] = {
    f"{norm}-norm, {label}": (InitialisedMemory, {"tokens": 5, "norm": norm, "spread": spread})
    for norm in ("pre", "post")
    for label, spread in (("copy", None), ("N(0, 1)", 1.0), ("N(0, 0.02^2)", 0.02))
}
ALL_ARMS = ARMS | STARTS


def rates_of(arm: str) -> tuple[float, ...]:
    """Four for every arm; those of full fine-tuning lie ten times lower."""
    return FULL_RATES if arm == "full fine-tuning" else RATES


# --- data and backbones ------------------------------------------------------------------------------------------


@cache
def source_of(dataset: str, part: Literal["old", "new"]) -> Source:
    """What the backbone is trained on ("old") and what is learned later ("new"); "omniglot" takes an alphabet behind a colon."""
    name, _, alphabet = dataset.partition(":")
    if name == "omniglot":
        return omniglot("background", list(ALPHABETS)) if part == "old" else omniglot("evaluation", [alphabet])
    whole = digits() if name == "digits" else fashion_mnist(2000, 2000)
    return whole.select((whole.labels < 5) == (part == "old"))


@cache
def task_of(dataset: str, on_valid: bool = False, deal: int | None = None, quarter_turns: int = 0) -> Task:
    """The new classes as one task.

    Args:
        on_valid: train and test on two parts of the train rows; for tuning.
        deal: shuffle the labels of the train rows.
        quarter_turns: turn all images; a task of its own, with labels of its own.
    """
    source = source_of(dataset, "new")
    source = source if deal is None else shuffled(source, deal)
    source = turned(source, (quarter_turns,)) if quarter_turns else source
    task = split_classes(source, per_task=len(source.classes), valid_share=VALID_SHARE if on_valid else 0.0)[0].task
    name = f"new {dataset}" + (f", turned {90 * quarter_turns}" if quarter_turns else "")
    return Task(name, task.train, task.valid if on_valid and task.valid is not None else task.test)


def few_of(task: Task, n: int, seed: int) -> Task:
    """The task with n train images of each class, drawn anew for every seed."""
    assert task.train is not None
    order = torch.randperm(len(task.train), generator=generator(seed, "few", task.name))
    targets = task.train.targets[order]
    rows = torch.cat([order[(targets == label).nonzero().flatten()[:n]] for label in task.classes])
    return Task(task.name, task.train.select(rows), task.test)


def pretrained(dataset: str, seed: int) -> PretrainedViT:
    """400 steps on classes 0-4; on Omniglot 40 passes over eight background alphabets, one backbone for all seeds."""
    name = dataset.partition(":")[0]
    source: Any = source_of(name if name == "omniglot" else dataset, "old")
    if name == "omniglot":
        return PretrainedViT(source, patch=7, epochs=40, seed=0)
    epochs = max(1, round(400 * 64 / len(source.train)))
    return PretrainedViT(source, patch=2 if name == "digits" else 7, epochs=epochs, seed=seed)


def backbone_of(dataset: str, seed: int) -> Path:
    """The folder of the pretrained backbone, from the cache where it is there."""
    return materialise(pretrained(dataset, seed))


# --- jobs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training: which arm, on what, at which rate; `on_valid` reads the validation part instead of the test part."""

    dataset: str
    arm: str
    seed: int
    lr: float
    steps: int = STEPS
    on_valid: bool = False
    shuffle: bool = False


def make(arm: str, backbone: str | Path | nn.Module, n_train: int, seed: int, lr: float, steps: int = STEPS, **settings: Any) -> Any:
    """A learner that takes `steps` batches of 64, as near as whole passes allow."""
    kind, own = ALL_ARMS[arm]
    epochs = max(1, round(steps * min(BATCH, n_train) / n_train))
    return kind(backbone, epochs=epochs, batch_size=BATCH, lr=lr, seed=seed, **own, **settings)  # type: ignore[call-arg]


def accuracy(learner: Learner, data: Data, task: str | None) -> float:
    """Share of right answers, told the task's name."""
    answers = [learner.predict(batch, task).labels() for batch in torch.split(data.inputs, 256)]
    return float((torch.cat(answers) == data.targets).double().mean())


def run_job(job: Job) -> dict[str, Any]:
    """Train, and read the new task's accuracy; the backbone's seed is the job's."""
    task = task_of(job.dataset, job.on_valid, job.seed if job.shuffle else None)
    assert task.train is not None
    learner = make(job.arm, backbone_of(job.dataset, job.seed), len(task.train), job.seed, job.lr, job.steps)
    start = time.process_time()
    last = fit(learner, task)
    seconds = time.process_time() - start
    n_trained = learner.footprint().trainable_parameters
    return {
        "accuracy": accuracy(learner, task.test, task.name), "trainable_parameters": n_trained,
        "steps": last.step if last else 0, "cpu_seconds": round(seconds, 2),
    }  # fmt: skip


def run_jobs(jobs: Sequence[Job], n_processes: int, run: Callable[[Job], dict[str, Any]] = run_job) -> dict[Job, dict[str, Any]]:
    """All jobs; backbones first, so that no two processes wait for one."""
    for dataset, seed in dict.fromkeys((job.dataset.partition(":")[0], job.seed) for job in jobs):
        backbone_of(dataset, seed)
    if n_processes == 1:
        return {job: run(job) for job in jobs}
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


def tune(dataset: str, arms: Iterable[str], steps: int, n_processes: int) -> dict[str, dict[str, Any]]:
    """Arm -> validation accuracy of its four rates on the tuning seed, and the best of them."""
    jobs = [Job(dataset, arm, TUNING_SEED, lr, steps, on_valid=True) for arm in arms for lr in rates_of(arm)]
    found = run_jobs(jobs, n_processes)
    table: dict[str, dict[str, Any]] = {}
    for job in jobs:
        table.setdefault(job.arm, {"valid": {}})["valid"][f"{job.lr:g}"] = found[job]["accuracy"]
    for arm, row in table.items():
        row["best"] = max(rates_of(arm), key=lambda lr: row["valid"][f"{lr:g}"])
        row["at_edge"] = row["best"] in (rates_of(arm)[0], rates_of(arm)[-1])
    return table
