"""The experiments of one seed; each gives tidy rows for facts.py to judge.

Rows name the experiment, the seed, the fact and what was measured; values are nats unless the column says otherwise.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from facts_world import EXPOSURES, Bench, State, rephrased, small

from remanence.erasure import (
    CleanFineTuning,
    GradientAscent,
    GradientDifference,
    SparseUpdate,
    erase,
    finish,
    median_log_p,
    relearning_steps,
    sparse_delta,
)
from remanence.facts import FactSet, KeywordScorer
from remanence.keys import generator
from remanence.parts.language_model import held_out_loss
from remanence.probes.forecast import forecast
from remanence.probes.priming import PrimingProbe, PrimingScores
from remanence.state import states_equal

FRACTIONS = (0.04, 0.08, 0.16, 0.32)
WINDOWS = (4, 8, 20)
LEVEL = math.log(0.5)
"""Memorisation at which ways of learning are compared: the keyword's log-probability after its context."""
MOST_EXPOSURES = 60
HELD_OUT_WINDOWS = 256

Row = dict[str, Any]


def grid(last: int) -> list[int]:
    """0, 1, 2, 5, 10, 20, 50, ... up to and with `last`."""
    steps = [0, *(base * 10**power for power in range(6) for base in (1, 2, 5))]
    return [step for step in steps if step < last] + [last]


def method_name(select: str, fraction: float, embeddings: bool) -> str:
    """How a sparse update is called in rows and tables."""
    return f"{select} {100 * fraction:g} %{', embeddings too' if embeddings else ''}"


class Seed:
    """One seed's experiments on a bench.

    Args:
        bench: where it all happens.
        clean_steps: steps without facts after the last exposure.
    """

    def __init__(self, bench: Bench, clean_steps: int) -> None:
        self.bench, self.clean_steps = bench, clean_steps
        self.held_out = small(bench.held_out, HELD_OUT_WINDOWS)
        self.probe = PrimingProbe(bench.facts, bench.tokenizer)
        bench.optimizer(bench.start)
        self.before = self.probe(bench.model)
        self.order = {fact.id: index for index, fact in enumerate(bench.facts)}
        self.ends: dict[str, State] = {}
        self._exchange()

    # --- G0 to G4: what is learned, what it moves, how long it stays ---------------------------------------------

    def known(self) -> Row:
        """How well the pretrained model knows its world, and its loss on held-out text."""
        self.bench.optimizer(self.bench.start)
        loss = held_out_loss(self.bench.model, self.held_out)
        return {"experiment": "world", "seed": self.bench.seed, "known": self.bench.known_share(), "held_out": loss}

    def forecasts(self) -> Iterator[Row]:
        """What the untouched model says of every fact."""
        self.bench.optimizer(self.bench.start)
        for row in forecast(self.bench.model, self.bench.facts, self.bench.tokenizer).to_dict("records"):
            yield {"experiment": "forecast", "seed": self.bench.seed, **row}

    def kinds(self) -> Iterator[Row]:
        """Each kind of fact in runs of four, and the control run; curves over steps."""
        yield from self._run("control", self.bench.facts[:0], "control")
        for kind in dict.fromkeys(fact.kind for fact in self.bench.facts):
            for group in self.bench.groups(kind):
                yield from self._run(kind, group, f"{kind} {group[0].id}")

    def _run(self, kind: str, facts: FactSet, name: str) -> Iterator[Row]:
        bench = self.bench
        optimizer = bench.optimizer(bench.start)
        injector = bench.inject(facts) if len(facts) else None
        marks = {EXPOSURES + step for step in grid(self.clean_steps)} | set(grid(EXPOSURES))
        for step in range(EXPOSURES + self.clean_steps + 1):
            if step in marks:
                yield from self._curves(kind, facts, step)
            if step == EXPOSURES:
                self.ends[name] = bench.state(optimizer)
            ids = bench.batch(step)
            bench.step(optimizer, injector.apply(ids, step) if injector else ids)

    def _curves(self, kind: str, facts: FactSet, step: int) -> Iterator[Row]:
        scores = self.probe(self.bench.model, self.before)
        table = scores.since(self.before)
        shown = table if kind == "control" else table[table["fact"].isin([fact.id for fact in facts])]
        for row in shown.to_dict("records"):
            yield {"experiment": "curve", "seed": self.bench.seed, "run": kind, "step": step, **row}
        if step in (0, EXPOSURES, EXPOSURES + self.clean_steps):
            loss = held_out_loss(self.bench.model, self.held_out)
            yield {"experiment": "held-out", "seed": self.bench.seed, "run": kind, "step": step, "held_out": loss}
        if kind != "control" and step == EXPOSURES:
            yield from self._nulls(facts, scores)

    def _nulls(self, facts: FactSet, scores: PrimingScores) -> Iterator[Row]:
        """Keywords of other facts, asked in these facts' places: a permutation of the keywords (G8)."""
        moved = (scores.prefix_log_p - self.before.prefix_log_p).double().numpy()
        keywords = {fact.keyword for fact in facts}
        for fact in facts:
            index = self.order[self.exchanged[fact.id]]
            if self.bench.facts[index].keyword in keywords:
                continue
            columns = [self.bench.facts.prefixes.index(prefix) for prefix in self.bench.facts.priming_prefixes(fact)]
            yield {
                "experiment": "permuted", "seed": self.bench.seed, "kind": fact.kind,
                "fact": fact.id, "keyword_of": self.exchanged[fact.id],
                "log_p_before": self.exchanged_log_p[fact.id], "priming_median": float(np.median(moved[index, columns])),
            }  # fmt: skip

    def _exchange(self) -> None:
        """Deal the keywords out anew, and ask the untouched model for each in its new place."""
        facts = self.bench.facts
        order = torch.randperm(len(facts), generator=generator(self.bench.seed, "exchange")).tolist()
        self.exchanged = {fact.id: facts[place].id for fact, place in zip(facts, order, strict=True)}
        pairs = [(fact.prompt, facts[place].keyword) for fact, place in zip(facts, order, strict=True)]
        log_p = KeywordScorer(self.bench.tokenizer, pairs)(self.bench.model).log_p.tolist()
        self.exchanged_log_p = dict(zip(self.exchanged, log_p, strict=True))

    # --- G5, E4: taking it out again -----------------------------------------------------------------------------

    def erasures(self, fractions: Sequence[float]) -> Iterator[Row]:
        """Sparse updates after the fact, and gradient erasers stopped at the same memory."""
        for group in self.bench.groups("outlandish"):
            end = self.ends[f"outlandish {group[0].id}"]
            yield from self._erased(group, end.weights, "injected")
            for select, embeddings, fraction in product(("ignore_top", "keep_top"), (False, True), fractions):
                weights = sparse_delta(self.bench.start.weights, end.weights, select, fraction, include_embeddings=embeddings)
                yield from self._erased(group, weights, method_name(select, fraction, embeddings))

    def trains_on(self, fraction: float, embeddings: bool, steps: int = 100) -> Iterator[Row]:
        """Held-out loss after the same clean batches, from the erased weights and from those before learning."""
        bench = self.bench
        for index, group in enumerate(bench.groups("outlandish")):
            end = self.ends[f"outlandish {group[0].id}"]
            erased = sparse_delta(bench.start.weights, end.weights, fraction=fraction, include_embeddings=embeddings)
            for name, state in (("before", bench.start), ("erased", State(erased, bench.start.moments))):
                optimizer = bench.optimizer(state)
                for step in range(EXPOSURES, EXPOSURES + steps):
                    bench.step(optimizer, bench.batch(step))
                loss = held_out_loss(bench.model, self.held_out)
                yield {"experiment": "trains on", "seed": bench.seed, "group": index, "from": name, "held_out": loss}

    def compared(self, fraction: float, embeddings: bool) -> Iterator[Row]:
        """E4: gradient erasers stopped at the memory that the sparse update leaves, on one group of facts."""
        bench, group = self.bench, self.bench.groups("outlandish")[0]
        end = self.ends[f"outlandish {group[0].id}"]
        weights = sparse_delta(bench.start.weights, end.weights, fraction=fraction, include_embeddings=embeddings)
        bench.model.load_state_dict(weights)
        target = median_log_p(bench.model, group, bench.tokenizer)
        yield from self._erased(group, weights, "compared: sparse", relearn=True)
        yield from self._erased(group, bench.start.weights, "compared: before", relearn=True)
        for method in (GradientAscent(), GradientDifference(), CleanFineTuning()):
            bench.model.load_state_dict(end.weights)
            facts = FactSet(group.facts)
            outcome = finish(
                erase(bench.model, facts, bench.tokenizer, method, bench.stream, target_log_p=target, steps=100, lr=1e-4, seed=bench.seed)
            )
            for row in self._erased(group, bench.weights(), f"compared: {method.name}", relearn=True):
                yield {**row, "steps": outcome.steps, "reason": outcome.reason}

    def _erased(self, group: FactSet, weights: dict[str, torch.Tensor], method: str, relearn: bool = False) -> Iterator[Row]:
        bench = self.bench
        bench.model.load_state_dict(weights)
        common = {"experiment": "erased", "seed": bench.seed, "method": method, "held_out": held_out_loss(bench.model, self.held_out)}
        common["known"] = bench.known_share()
        if relearn:
            common["relearning_steps"] = relearning_steps(bench.model, group, bench.tokenizer)
        table = self.probe(bench.model, self.before).since(self.before)
        for row in table[table["fact"].isin([fact.id for fact in group])].to_dict("records"):
            yield {**common, **row}

    # --- G6, G7: learning with less priming ----------------------------------------------------------------------

    def diluted(self, fraction: float, embeddings: bool) -> Iterator[Row]:
        """Ignore-top inside training, against plain training; curves over exposures (G6)."""
        for group in self.bench.groups("outlandish"):
            yield from self._exposed("plain", group, group)
            for every in WINDOWS:
                yield from self._exposed(f"every {every}", group, group, (every, fraction, embeddings))

    def stones(self) -> Iterator[Row]:
        """Stepping stones before the keyword, and two controls (G7)."""
        bench = self.bench
        for group in bench.groups("outlandish"):
            for name in ("stone", "filler", "rewrite"):
                texts = [fact.stone if name == "stone" else str(fact.extra[name]) for fact in group]
                changed = FactSet(tuple(rephrased(fact, text) for fact, text in zip(group, texts, strict=True)))
                bench.optimizer(bench.start)
                pairs = [(fact.prompt, fact.keyword) for fact in changed]
                before = KeywordScorer(bench.tokenizer, pairs)(bench.model).log_p.tolist()
                for fact, log_p in zip(group, before, strict=True):
                    yield {"experiment": "stone", "seed": bench.seed, "variant": name, "fact": fact.id, "log_p_before": log_p}
                yield from self._exposed(name, group, changed)

    def _exposed(self, name: str, group: FactSet, shown: FactSet, window: tuple[int, float, bool] | None = None) -> Iterator[Row]:
        """Exposures until every fact is known at LEVEL, measured after each fourth; masks fall on the same steps."""
        bench = self.bench
        optimizer = bench.optimizer(bench.start)
        update = window and SparseUpdate.wrap(optimizer, bench.model, every=window[0], fraction=window[1], include_embeddings=window[2])
        injector = bench.inject(shown, MOST_EXPOSURES)
        ids = [fact.id for fact in group]
        own = KeywordScorer(bench.tokenizer, [(fact.prompt, fact.keyword) for fact in shown])
        for step in range(MOST_EXPOSURES):
            bench.step(optimizer, injector.apply(bench.batch(step), step))
            if (step + 1) % (window[0] if window else 1) or ((step + 1) % 4 and step >= 8):
                continue
            table = self.probe(bench.model, self.before).since(self.before).set_index("fact").loc[ids].reset_index()
            table["own_log_p"] = own(bench.model).log_p.tolist()  # after the words that were shown
            for row in table.to_dict("records"):
                yield {"experiment": "exposed", "seed": bench.seed, "variant": name, "exposures": step + 1, **row}
            if (table["own_log_p"] > LEVEL + 0.35).all():
                break
        if update:
            update.remove()

    # --- G8: what nothing does -----------------------------------------------------------------------------------

    def nothing(self) -> Iterator[Row]:
        """A run whose schedule shows nothing against one without an injector; both ends of a sparse update."""
        bench = self.bench
        ends: list[State] = []
        for injector in (None, bench.inject(bench.groups("outlandish")[0]).control()):
            optimizer = bench.optimizer(bench.start)
            for step in range(10):
                ids = bench.batch(step)
                bench.step(optimizer, injector.apply(ids, step) if injector else ids)
            ends.append(bench.state(optimizer))
        start, end = bench.start.weights, self.ends[next(name for name in self.ends if name.startswith("outlandish"))].weights
        extremes = {("ignore_top", 0.0): end, ("ignore_top", 1.0): start, ("keep_top", 0.0): start, ("keep_top", 1.0): end}
        names = [("no exposures", states_equal(ends[0].weights, ends[1].weights))]
        # keep_top of everything leaves out entries that did not change, which hold the same bits anyway
        names += [(f"{select} {fraction:g}", states_equal(sparse_delta(start, end, select, fraction), expected))
                  for (select, fraction), expected in extremes.items()]  # fmt: skip
        for name, is_equal in names:
            yield {"experiment": "nothing", "seed": bench.seed, "case": name, "equal": is_equal}
