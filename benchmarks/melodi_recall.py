"""A2: what was bound in a document's first window, asked for many windows later.

Window 0 holds 3 tokens, each of them a key bound to a value, at random places among noise; then come G windows of noise, and one window of
noise with 6 keys to be answered. Answers are targets only: they are never an input, and keys are drawn with replacement, so that neither
elimination nor copying solves the task. Chance is 1/8; who knows the three values but not which key they belong to gets 0.45.

Training climbs through G = 0, 1, 2, 4, 8, 10, one stage after the other; all windows of a sample stand in one call, so that the write gets
a gradient from the answer.

Axes: B samples, T tokens of a sample, W = 32 tokens of a window.
"""

import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from melodi_arms import make
from torch import Tensor
from torch.nn.functional import cross_entropy

from remanence.keys import generator
from remanence.parts.optimizer_state import load_moments, moments
from remanence.state import load_state, save_state

WINDOW, N_PAIRS, N_KEYS, N_VALUES, N_NOISE, N_QUERIES = 32, 3, 8, 8, 32, 6
NOISE = N_KEYS * N_VALUES
ASKED = NOISE + N_NOISE
ANSWER = ASKED + N_KEYS
VOCABULARY = ANSWER + N_VALUES + 1
"""Tokens: the pairs (key x 8 + value), noise, keys that ask, answers, and the one that begins a document, which stands nowhere."""

CHANCE = 1 / N_VALUES
_EQUAL = 1 / N_VALUES**2
_TWO_EQUAL = 3 * (N_VALUES - 1) / N_VALUES**2
UNBOUND = _EQUAL + _TWO_EQUAL * 2 / 3 + (1 - _EQUAL - _TWO_EQUAL) / 3
"""Best accuracy of who knows the sample's values, but not their keys: the most frequent of the three."""

STAGES = (0, 1, 2, 4, 8, 10)
GAPS = (0, 1, 2, 4, 8, 10, 12, 16)
"""G in training, and in the test."""

BATCH, LR, BETAS, WARM_UP, FINAL, EASIER, SURE, N_RECENT = 16, 2e-3, (0.9, 0.98), 100, 600, 0.3, 0.9, 10
_TEST_BATCH, _CHECKPOINT_STEPS = 64, 50


class Samples(NamedTuple):
    """tokens (B, T); answers (B, 6) ids; places (B, 6) of the keys that ask."""

    tokens: Tensor
    answers: Tensor
    places: Tensor


def samples(n: int, gap: int, *key: int | str) -> Samples:
    """n samples with `gap` windows of noise between; a pure function of the key.

    Example:
        >>> made = samples(2, 1, "example")
        >>> made.tokens.shape, made.answers.shape
        (torch.Size([2, 96]), torch.Size([2, 6]))
    """
    random = generator("recall", gap, *key)
    length = WINDOW * (gap + 2)
    tokens = NOISE + torch.randint(N_NOISE, (n, length), generator=random)
    keys = torch.rand(n, N_KEYS, generator=random).argsort(1)[:, :N_PAIRS]
    values = torch.randint(N_VALUES, (n, N_PAIRS), generator=random)
    written = torch.rand(n, WINDOW, generator=random).argsort(1)[:, :N_PAIRS]
    places = length - WINDOW + torch.rand(n, WINDOW, generator=random).argsort(1)[:, :N_QUERIES]
    asked = torch.randint(N_PAIRS, (n, N_QUERIES), generator=random)
    tokens.scatter_(1, written, keys * N_VALUES + values)
    tokens.scatter_(1, places, ASKED + keys.gather(1, asked))
    return Samples(tokens, ANSWER + values.gather(1, asked), places)


def answer(model: Any, made: Samples) -> Tensor:
    """(B, 6, V) logits where a key asks, from an empty state."""
    logits, _ = model(made.tokens)
    return logits.gather(1, made.places[..., None].expand(*made.places.shape, logits.shape[-1]))


@torch.no_grad()
def accuracies(model: Any, n: int) -> dict[str, float]:
    """Share of right answers on n fresh samples of every G, the same ones for every arm."""
    model.eval()
    found = {}
    for gap in GAPS:
        right = []
        for part in range(0, n, _TEST_BATCH):
            made = samples(min(_TEST_BATCH, n - part), gap, "test", part)
            right.append(answer(model, made).argmax(-1) == made.answers)
        found[str(gap)] = torch.cat(right).double().mean().item()
    return found


class Curriculum:
    """Which G a step trains at, and when the next stage begins.

    A stage ends when the answers of its last 10 batches at the stage's own G are right to more than 0.9 together; three in ten batches
    are of a random smaller G.

    Args:
        seed: of the choice.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.stage, self.began = seed, 0, [0]
        self.recent: deque[float] = deque(maxlen=N_RECENT)

    @property
    def is_last(self) -> bool:
        """Whether the last stage has begun."""
        return self.stage == len(STAGES) - 1

    def gap(self, step: int) -> int:
        """G of a step; a pure function of the stage and the step."""
        highest = STAGES[self.stage]
        random = generator("curriculum", self.seed, step)
        if highest == 0 or torch.rand((), generator=random) >= EASIER:
            return highest
        return int(torch.randint(highest, (), generator=random))

    def note(self, gap: int, accuracy: float, step: int) -> None:
        """Take in the accuracy of a batch."""
        if gap != STAGES[self.stage]:
            return
        self.recent.append(accuracy)
        if not self.is_last and len(self.recent) == N_RECENT and sum(self.recent) / N_RECENT > SURE:
            self.stage += 1
            self.began.append(step + 1)
            self.recent.clear()

    def state(self) -> dict[str, Any]:
        return {"stage": self.stage, "began": self.began, "recent": list(self.recent)}

    def load(self, state: dict[str, Any]) -> None:
        self.stage, self.began = state["stage"], list(state["began"])
        self.recent = deque(state["recent"], maxlen=N_RECENT)


class Training:
    """AdamW on batches that the curriculum chooses.

    The rate warms up, stays, and falls to zero along the last 600 steps: those after the last stage has begun, or those before the limit.

    Args:
        model: trained in place.
        seed: key of data and curriculum.
        steps: at most.
        folder: for the checkpoint.
    """

    def __init__(self, model: Any, seed: int, steps: int, folder: Path) -> None:
        self.model, self.seed, self.steps = model, seed, steps
        self.path = folder / "training.safetensors"
        self.curriculum, self.optimizer = Curriculum(seed), _optimizer(model)
        self.step, self.cpu_seconds = 0, 0.0
        self.trace: list[tuple[int, int, float]] = []

    @property
    def end(self) -> int:
        """The step at which the training ends, as far as it is known."""
        return min(self.steps, self.curriculum.began[-1] + FINAL) if self.curriculum.is_last else self.steps

    @property
    def rate(self) -> float:
        """Of this step."""
        return LR * min(1.0, (self.step + 1) / WARM_UP, (self.end - self.step) / FINAL)

    def run(self) -> None:
        self._resume()
        while self.step < self.end:
            start = time.process_time()
            self._train_step()
            self.cpu_seconds += time.process_time() - start
            if self.step % _CHECKPOINT_STEPS == 0:
                self._save()

    def _train_step(self) -> None:
        gap = self.curriculum.gap(self.step)
        made = samples(BATCH, gap, self.seed, self.step)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = answer(self.model, made).float()
        loss = cross_entropy(logits.flatten(0, 1), made.answers.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self._note(gap, (logits.detach().argmax(-1) == made.answers).double().mean().item())

    def _note(self, gap: int, accuracy: float) -> None:
        before = self.curriculum.stage
        self.curriculum.note(gap, accuracy, self.step)
        self.step += 1
        if self.step % 25 == 0:
            self.trace.append((self.step, gap, round(accuracy, 3)))
        if self.curriculum.stage > before:
            print(f"recall, seed {self.seed}: G = {STAGES[self.curriculum.stage]} from step {self.step}", flush=True)

    def _save(self) -> None:
        kept = {"step": self.step, "cpu_seconds": self.cpu_seconds, "trace": [list(row) for row in self.trace]}
        parts = {"model": self.model.state_dict(), "moments": moments(self.optimizer), "curriculum": self.curriculum.state()}
        save_state(self.path, kept | parts)

    def _resume(self) -> None:
        if not self.path.exists():
            return
        saved = load_state(self.path)
        self.model.load_state_dict(saved["model"])
        load_moments(self.optimizer, saved["moments"])
        self.curriculum.load(saved["curriculum"])
        self.step, self.cpu_seconds = saved["step"], saved["cpu_seconds"]
        self.trace = [tuple(row) for row in saved["trace"]]


def _optimizer(model: Any) -> torch.optim.Optimizer:
    matrices, others = ([p for p in model.parameters() if (p.dim() >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)


def recall(training: Path, arm: str, model: str, config: dict[str, Any], seed: int, steps: int, n_test: int) -> dict[str, Any]:
    """Train an arm through the curriculum, and test it at every G."""
    made = make(model, {"vocab_size": VOCABULARY, "window": WINDOW} | config, seed)
    run = Training(made, seed, steps, training)
    run.run()
    return {
        "accuracy": accuracies(made, n_test), "n_test": n_test, "steps": run.step,
        "stages": {str(STAGES[index]): step for index, step in enumerate(run.curriculum.began)},
        "cpu_seconds": run.cpu_seconds, "parameters": sum(parameter.numel() for parameter in made.parameters()), "trace": run.trace,
    }  # fmt: skip
