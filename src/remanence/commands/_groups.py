"""The training behind `remanence trace`: groups of facts, one of each theme, each written into a copy of one warmed-up model.

Every group begins at the same weights with the same moments of the optimizer, and sees the same batches but for its own facts. One
further run sees none: the paired control of all groups.

Axes: B rows of a batch; T tokens predicted per row; P parameters.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from remanence.errors import NonFiniteLoss
from remanence.facts.injection import FactInjector
from remanence.facts.records import FactSet
from remanence.facts.schedules import Spaced
from remanence.keys import keyed_rng
from remanence.parts.language_model import token_loss
from remanence.parts.optimizer_state import load_moments, moments
from remanence.probes.tracing import FactTracer
from remanence.state import State, copy_state
from remanence.task import Data

WARM_STEPS = 50
"""Clean steps before the first exposure: the steps of a fresh AdamW have one size on every weight and would inflate every effect."""

_CLIP = 1.0
_TIMED = 3

Report = Callable[[int, int], None]


def grouped(facts: FactSet) -> list[FactSet]:
    """Sets with one fact of each theme at most; the n-th facts of all themes make the n-th set."""
    places: dict[str, int] = {}
    group_of: dict[str, int] = {}
    for fact in facts:
        group_of[fact.id] = places.get(fact.theme, 0)
        places[fact.theme] = group_of[fact.id] + 1
    return [_part(facts, {name for name, group in group_of.items() if group == index}) for index in range(max(group_of.values()) + 1)]


def _part(facts: FactSet, names: set[str]) -> FactSet:
    return facts.where(lambda fact: fact.id in names)


@dataclass(frozen=True)
class TraceSettings:
    """What a trace does to a copy of the model.

    Args:
        every, times: see `Spaced`.
        clean_steps: steps after the last exposure.
        lr: of AdamW, constant.
        batch_size: rows of a step.
        length: tokens predicted per row.
        seed: of the order of batches, and of dropout.
    """

    every: int
    times: int
    clean_steps: int
    lr: float
    batch_size: int
    length: int
    seed: int

    @property
    def schedule(self) -> Spaced:
        """The steps that show a fact; the first step is one of them."""
        return Spaced(self.every, self.times)

    @property
    def last_exposure(self) -> int:
        """Steps done when the last exposure is learned."""
        return self.every * (self.times - 1) + 1

    @property
    def n_steps(self) -> int:
        """Of a run behind the warm-up."""
        return self.last_exposure + self.clean_steps


class TraceRuns:
    """The runs of one trace.

    Args:
        model: trained in place; load it for this purpose alone.
        tokenizer: the model's own.
        facts: of all groups.
        train: windows of clean text.
        held_out: windows whose loss is traced.
        settings: of all runs.
    """

    def __init__(self, model: Any, tokenizer: Any, facts: FactSet, train: Data, held_out: Data, settings: TraceSettings) -> None:
        self.model, self.tokenizer, self.facts, self.settings = model, tokenizer, facts, settings
        self.groups = grouped(facts)
        self._train, self._held_out = train, held_out
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
        self._report: Report = lambda done, total: None

    def group(self, number: int, report: Report) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Write a group's facts into the model and trace them.

        Returns:
            Curves as in `FactTracer.curves`, and the held-out losses.

        Raises:
            NonFiniteLoss: the loss or the weights became NaN or infinite.
        """
        facts = self.groups[number]
        return self._run(facts, FactInjector(facts, self.tokenizer, self.settings.schedule), report)

    def control(self, report: Report) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The run without facts; it traces all of them."""
        return self._run(self.facts, None, report)

    def seconds(self) -> float:
        """How long all runs will take, from the medians of a few steps and probes of one group; the model is changed."""
        steps = [_timed(self._step, number, None) for number in range(_TIMED + 1)]
        tracer = self._tracer(self.groups[0], None)
        probes = [_timed(tracer.start, self.model) for _ in range(_TIMED)]
        # the first step makes the optimizer's state; a median, because a busy machine may halt a single step for seconds
        a_step, a_probe = median(steps[1:]), median(probes)
        n_probes = 2 + sum(map(tracer.is_due, range(1, self.settings.n_steps)))
        return WARM_STEPS * a_step + (len(self.groups) + 1) * (self.settings.n_steps * a_step + n_probes * a_probe)

    @cached_property
    def _start(self) -> State:
        """The warmed-up model and its optimizer."""
        for step in range(WARM_STEPS):
            loss = self._step(-1 - step, None)
            if not loss.isfinite():
                raise NonFiniteLoss(f"step {step} of the warm-up gave a loss of {loss.item()}; lower --lr {self.settings.lr}.")
            self._report(step + 1, self.settings.n_steps + WARM_STEPS)
        return {"model": copy_state(self.model.state_dict()), "moments": copy_state(moments(self._optimizer))}

    def _run(self, facts: FactSet, injector: FactInjector | None, report: Report) -> tuple[pd.DataFrame, pd.DataFrame]:
        self._report = report
        self._begin()
        tracer = self._tracer(facts, injector)
        tracer.start(self.model)
        n_steps = self.settings.n_steps
        for step in range(n_steps):
            loss = self._step(step, injector)
            if tracer.step(self.model, step + 1, loss) is None and step + 1 == n_steps:
                tracer.probe(self.model, n_steps)
            report(step + 1, n_steps)
        return tracer.curves(), tracer.held_out

    def _begin(self) -> None:
        start = self._start
        self.model.load_state_dict(start["model"])
        load_moments(self._optimizer, start["moments"])

    def _tracer(self, facts: FactSet, injector: FactInjector | None) -> FactTracer:
        return FactTracer(facts, self.tokenizer, self._held_out, last_exposure=self.settings.last_exposure, injector=injector)

    def _step(self, step: int, injector: FactInjector | None) -> Tensor:
        """One optimizer step; negative ones are those of the warm-up."""
        rows = self._train.rows(max(step, -1 - step), self.settings.batch_size, self.settings.seed, "warm-up" if step < 0 else "trace")
        inputs, targets = self._train.inputs[rows], self._train.targets[rows]
        if injector is not None:
            ids = injector.apply(torch.cat([inputs, targets[:, -1:]], dim=1), step)
            inputs, targets = ids[:, :-1], ids[:, 1:]
        device = next(self.model.parameters()).device
        self.model.train()
        # dropout draws from the global generator: the key gives all runs the same masks
        with keyed_rng(self.settings.seed, "dropout", step), torch.enable_grad():
            loss = token_loss(self.model, inputs.to(device), targets.to(device))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self._optimizer.step()
        return loss.detach()


def _timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start
