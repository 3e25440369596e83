"""What the experiments of facts.py share: a closed world, a model that knows it, and the training that goes on.

Axes: B rows of a batch; T tokens.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remanence.artifact import materialise
from remanence.facts import ClosedWorld, Fact, FactInjector, FactSet, KeywordScorer, Spaced, closed_world
from remanence.learner import Progress
from remanence.parts import PretrainedLM
from remanence.parts.language_model import load_language_model, load_tokenizer, token_loss
from remanence.parts.optimizer_state import load_moments, moments
from remanence.streams.text import windows
from remanence.task import Data

LENGTH, BATCH, RATE = 40, 16, 3e-4
WARM_STEPS, EXPOSURES = 50, 20
KINDS = ("mundane", "outlandish", "scrambled")
PER_RUN = 4
"""One fact of each theme shares a run; two texts of different themes prime independently (Sun et al. 2025)."""


@dataclass(frozen=True)
class State:
    """A model's weights and its optimizer's moments."""

    weights: dict[str, Tensor]
    moments: list[dict[str, Any]]


class Bench:
    """One seed: world, pretrained model, the stream that goes on, and the state from which every run begins.

    Args:
        seed: of the world, of pretraining and of the later stream.
        steps: of pretraining.
        n_facts: of each kind.
        on_progress: called after each step of pretraining.
    """

    def __init__(self, seed: int, steps: int, n_facts: int, on_progress: Callable[[Progress], None] | None = None) -> None:
        self.seed, self.world = seed, closed_world(seed)
        folder = materialise(pretrained(self.world, steps), on_progress)
        self.model, self.tokenizer = load_language_model(folder), load_tokenizer(folder)
        made = [self.world.facts(kind, n_facts) for kind in KINDS]
        prefixes = tuple(dict.fromkeys(prefix for facts in made for prefix in facts.prefixes))
        self.facts = FactSet(tuple(fact for facts in made for fact in facts), prefixes)
        later = self.world.continuing(self.facts, 12_000)
        self.stream = windows(later.train, self.tokenizer, LENGTH, f"later {seed}")
        self.held_out = windows(later.test, self.tokenizer, LENGTH, f"later test {seed}")
        self.start = self._warmed()

    def _warmed(self) -> State:
        """The pretrained model after clean steps: a fresh AdamW would make its first steps in every weight alike."""
        optimizer = self.optimizer()
        for step in range(-WARM_STEPS, 0):
            self.step(optimizer, self.batch(step))
        return self.state(optimizer)

    def optimizer(self, state: State | None = None) -> torch.optim.Optimizer:
        """An optimizer of the model; with a state, both stand where it was taken."""
        if state is not None:
            self.model.load_state_dict(state.weights)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
        if state is not None:
            load_moments(optimizer, state.moments)
        return optimizer

    def state(self, optimizer: torch.optim.Optimizer) -> State:
        """A copy of where model and optimizer stand."""
        return State(self.weights(), copy.deepcopy(moments(optimizer)))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's weights."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def batch(self, step: int) -> Tensor:
        """(B, T + 1) ids of a step of the later stream; the same in every run."""
        rows = self.stream.rows(step + WARM_STEPS, BATCH, self.seed, "later")
        return torch.cat([self.stream.inputs[rows], self.stream.targets[rows, -1:]], 1)

    def step(self, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        """One optimizer step."""
        self.model.train()
        loss = token_loss(self.model, ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def inject(self, facts: Sequence[Fact], times: int = EXPOSURES) -> FactInjector:
        """Facts shown in every step from the first on."""
        return FactInjector(FactSet(tuple(facts)), self.tokenizer, Spaced(every=1, times=times))

    def groups(self, kind: str) -> list[FactSet]:
        """The facts of a kind, one of each theme together."""
        chosen = self.facts.where(lambda fact: fact.kind == kind)
        return [chosen[first : first + PER_RUN] for first in range(0, len(chosen), PER_RUN)]

    def known_share(self) -> float:
        """Mean probability of the right answer about everybody whom the corpus knows (G0)."""
        pairs = [(fact.prompt, fact.keyword) for fact in self.world.known()]
        return float(KeywordScorer(self.tokenizer, pairs)(self.model).log_p.double().exp().mean())


def pretrained(world: ClosedWorld, steps: int) -> PretrainedLM:
    """The model of a world: a GPT-2 of width 96 and depth 2, whose vocabulary holds the world's words."""
    return PretrainedLM(
        world.source, vocab_size=3000, width=96, depth=2, length=LENGTH, steps=steps, extra_words=world.words, seed=world.seed
    )


def rephrased(fact: Fact, text: str) -> Fact:
    """The same fact in a text that ends with the same keyword."""
    context = text[: text.rindex(fact.keyword)].rstrip()
    return Fact(fact.id, fact.theme, fact.kind, text, fact.keyword, context, fact.subject)


def small(data: Data, n: int) -> Data:
    """The first n windows."""
    return data.select(torch.arange(min(n, len(data))))
