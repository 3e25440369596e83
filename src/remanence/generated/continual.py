"""Continual HyperTransformer: the weights it wrote for one task are what it starts from at the next.

    model = ContinualHyperTransformer(TargetNet(norm="group"))
    state = model.init_state()
    state = model.step(state, support_x, support_y, class_names)     # pure: the old state stays valid
    logits = model.predict(state, x)                                 # over all classes seen

State between tasks: the slices of every layer, and one class mean per class, laid down with the weights of its own time and never
recomputed. No image is kept and no gradient is taken. What makes this a memory is the training: the weights after task t must still
send images of earlier tasks near the means that earlier weights laid down.

Source: Vladymyrov, Zhmoginov and Sandler 2023, "Continual HyperTransformer" (arXiv 2301.04584). ours: a learned start, `update="add"`,
    a learned temperature, and a norm over single images: batch statistics would tell which task a query comes from.

Axes: B sequences, T tasks, S support samples, N images, n ways, P classes held, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from remanence.errors import DataError, SettingError
from remanence.generated.episode import Episode
from remanence.generated.heads import class_means, linear, squared_distances
from remanence.generated.hypertransformer import HyperTransformer, Slices
from remanence.generated.target import TargetNet

Scenario = Literal["class", "task", "minibatch"]
Update = Literal["add", "replace", "gate"]


@dataclass(frozen=True, eq=False)
class ContinualState:
    """All that is carried from task to task, for B sequences.

    Args:
        slices: what the written layers hold: name -> (B, T, b).
        prototypes: (B, P, D) class means, each in the embedding of its own time.
        counts: (B, P) samples behind each mean; 0 where a sequence does not have the class.
        task_of_class: (P,) int64 task in which a class came first, counted from 0.
        n_tasks: tasks taken in.
        tensors: of the CNN that the slices stand for, as in `remanence.generated.target`; empty before the first task.
    """

    slices: Slices
    prototypes: Tensor
    counts: Tensor
    task_of_class: Tensor
    n_tasks: int
    tensors: dict[str, Tensor]


class ContinualHyperTransformer(HyperTransformer):
    """A HyperTransformer whose weight tokens read what the slices held before.

    Args:
        target: with norm="group"; "batch" makes answers depend on each other.
        scenario: who is asked. "class": all classes seen; "task": those of a named task; "minibatch": the classes are the same in
            every step, and their means grow more exact.
        update: "add" what is written to what was held, "replace" it, or "gate": a learned share of each slice.
        carry: False gives every task the learned start instead of what was held: the ablation without recurrence.
        renorm: give every slice the length of its learned start; the norm behind a convolution makes length meaningless.
        head: "prototype", or "generated": a written last layer is carried too and no class mean is used.
        settings: of `HyperTransformer`.

    Raises:
        SettingError: a setting is unknown or contradicts another.
    """

    reads_previous = True

    def __init__(
        self, target: TargetNet, scenario: Scenario = "class", update: Update = "add", carry: bool = True, renorm: bool = False,
        head: Literal["prototype", "generated"] = "prototype", **settings: object,
    ) -> None:  # fmt: skip
        for name, value, known in (
            ("scenario", scenario, ("class", "task", "minibatch")), ("update", update, ("add", "replace", "gate")),
            ("head", head, ("prototype", "generated")), ("generate", settings.get("generate", "all"), ("all",)),
            ("preset", settings.get("preset"), (None,)),
        ):  # fmt: skip
            if value not in known:
                raise SettingError(f"ContinualHyperTransformer: {name}={value!r}; give one of {', '.join(map(repr, known))}.")
        super().__init__(target, head=head, **settings)  # type: ignore[arg-type]
        self.settings |= {"scenario": scenario, "update": update, "carry": carry, "renorm": renorm}
        self.scenario, self.carry, self.renorm, self.update_form = scenario, carry, renorm, update
        if head == "generated":
            self.base["logits"] = nn.Parameter(torch.zeros(1, target.embedding_width + 1))
        if update == "gate":
            self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(len(start))) for name, start in self.base.items()})

    # --- state -------------------------------------------------------------------------------------------------

    def init_state(self, batch: int = 1) -> ContinualState:
        """The state before any task: the learned start, and no class."""
        start = self.base["conv1"]
        slices = {name: value.expand(batch, self._n_slices(name), -1) for name, value in self.base.items()}
        n_classes = self.max_ways if self.head == "generated" else 0
        return ContinualState(
            slices, start.new_zeros(batch, n_classes, self.target.embedding_width), start.new_zeros(batch, n_classes),
            torch.zeros(n_classes, dtype=torch.int64, device=start.device), 0, {},
        )  # fmt: skip

    def _n_slices(self, name: str) -> int:
        return self.max_ways if name == "logits" else len(self.base[name])

    def step(
        self, state: ContinualState, support_x: Tensor, support_y: Tensor, mask: Tensor | None = None, slots: Tensor | None = None,
        draw: torch.Generator | None = None,
    ) -> ContinualState:  # fmt: skip
        """Take one task (or mini-batch) in; returns a new state and leaves the old one as it was.

        Args:
            state: what is held, for B sequences.
            support_x: (B, S, C, H, W).
            support_y: (B, S) int64 slots 0..n-1 of this task, or `UNLABELED`.
            mask: (B, S) bool, True = present.
            slots: (n,) int64, which held class each slot is; -1 for a new one. By default all are new, except in scenario
                "minibatch" and with a generated head, where slot j is class j.
            draw: with random label codes, what they are drawn from.

        Raises:
            DataError: shapes, labels or pixels are wrong; a class has no sample; the new weights are not finite.
        """
        episode = Episode(support_x, support_y, support_x[:, :0], support_mask=mask, allow_empty=self.head == "generated")
        self.target.require_fit(support_x)
        if len(support_x) != len(state.prototypes):
            raise DataError(f"the state holds {len(state.prototypes)} sequences, the support set {len(support_x)}.")
        return self._take_in(state, episode, slots, self._codes(len(support_x), draw))

    def _take_in(self, state: ContinualState, episode: Episode, slots: Tensor | None, codes: Tensor | None) -> ContinualState:
        x, mask, n_ways = episode.support_x, episode.support_mask, episode.n_max
        labels = self._rows(episode.support_y, n_ways)
        shared = self.shared(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        previous = state.slices if self.carry else self.init_state(len(x)).slices
        tensors, embeddings, held = self.trunk(x, labels, shared, mask, codes, previous)
        if self.head == "generated":
            held["logits"] = self._carry_head(embeddings, labels, shared, mask, codes, previous["logits"])
            tensors |= {"logits.weight": held["logits"][..., :-1], "logits.bias": held["logits"][..., -1]}
        means, counts = class_means(embeddings, labels, n_ways, mask)
        return _with_classes(replace(state, slices=held, tensors=tensors), means, counts, self._places(state, slots, n_ways))

    def _carry_head(
        self, embeddings: Tensor, labels: Tensor, shared: Tensor, mask: Tensor | None, codes: Tensor | None, previous: Tensor
    ) -> Tensor:
        written = self.write_head(embeddings, labels, shared, mask, codes, self.max_ways, previous)
        return self._join("logits", previous, written)

    def _places(self, state: ContinualState, slots: Tensor | None, n_ways: int) -> Tensor:
        if slots is not None:
            return slots
        if self.head == "generated" or (self.scenario == "minibatch" and state.n_tasks):
            return torch.arange(n_ways)
        return torch.full((n_ways,), -1)

    def update(
        self, name: str, features: Tensor, labels: Tensor, mask: Tensor | None, codes: Tensor | None, previous: Tensor | None
    ) -> Tensor:
        if previous is None:
            previous = self.base[name].expand(len(labels), -1, -1)
        return self._join(name, previous, self.generators[name](features, labels, mask, codes, previous))

    def _join(self, name: str, previous: Tensor, written: Tensor) -> Tensor:
        if self.update_form == "add":
            joined = previous + written
        elif self.update_form == "replace":
            joined = self.base[name] + written
        else:
            joined = torch.lerp(previous, self.base[name] + written, self.gates[name].sigmoid()[:, None])
        if self.renorm and name != "logits":
            joined = joined * (self.base[name].norm(dim=-1, keepdim=True) / joined.norm(dim=-1, keepdim=True))
        return joined

    # --- answers -----------------------------------------------------------------------------------------------

    def embed(self, state: ContinualState, x: Tensor) -> Tensor:
        """Images (B, N, C, H, W) -> embeddings (B, N, D) under the newest weights."""
        return self.target.embed(x, state.tensors)

    def predict(self, state: ContinualState, x: Tensor, task: int | None = None) -> Tensor:
        """Images (B, N, C, H, W) -> logits (B, N, P) over the classes held; -inf outside of `task` where one is named.

        Raises:
            DataError: nothing was learned yet.
        """
        if not state.n_tasks:
            raise DataError("the state holds no class yet; call step() first.")
        if self.head == "generated":
            return self.target.functional(x, state.tensors).masked_fill((state.counts == 0)[:, None], -torch.inf)
        return self.answer(self.embed(state, x), state, task)

    def answer(self, embeddings: Tensor, state: ContinualState, task: int | None = None) -> Tensor:
        """Embeddings (B, N, D) -> logits (B, N, P): minus the scaled squared distance to each class mean."""
        logits = -self.log_scale.exp() * squared_distances(embeddings, state.prototypes)
        outside = state.counts == 0
        if task is not None:
            outside = outside | (state.task_of_class != task)
        return logits.masked_fill(outside[:, None], -torch.inf)

    # --- training ----------------------------------------------------------------------------------------------

    def unroll(self, sequence: Sequence[Episode], draw: torch.Generator | None = None) -> list[Tensor]:
        """Take a sequence in and answer, after every task, the queries of all tasks so far.

        Args:
            sequence: T episodes of the same B sequences.

        Returns:
            For each t, logits (B, (t + 1) * Q, P): the queries of task 0 first.
        """
        answers = []
        for t, state in enumerate(self.states(sequence, draw)):
            queries = torch.cat([earlier.query_x for earlier in sequence[: t + 1]], 1)
            answers.append(self._answer_tasks(state, queries, t + 1))
        return answers

    def states(self, sequence: Sequence[Episode], draw: torch.Generator | None = None) -> list[ContinualState]:
        """The state after each task of a sequence, with gradients through the whole recurrence."""
        state, codes = self.init_state(len(sequence[0])), self._codes(len(sequence[0]), draw)
        found = []
        for episode in sequence:
            state = self._take_in(state, episode, None, codes)
            found.append(state)
        return found

    def head_and_means(self, state: ContinualState, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N, P) of a generated head, and those of the class means on the same embeddings; see `HyperTransformer.answers`."""
        embeddings = self.embed(state, x)
        absent = (state.counts == 0)[:, None]
        return linear(embeddings, state.tensors).masked_fill(absent, -torch.inf), self.answer(embeddings, state)

    def _answer_tasks(self, state: ContinualState, queries: Tensor, n_tasks: int) -> Tensor:
        if self.head == "generated" or self.scenario != "task":
            return self.predict(state, queries)
        embeddings = self.embed(state, queries).chunk(n_tasks, 1)
        return torch.cat([self.answer(part, state, task) for task, part in enumerate(embeddings)], 1)


def _with_classes(state: ContinualState, means: Tensor, counts: Tensor, places: Tensor) -> ContinualState:
    """The state with the class means of a task in it: new classes behind the others, known ones merged by their counts."""
    new, known = places < 0, places >= 0
    prototypes, held = state.prototypes, state.counts
    if known.any():
        rows = places[known]
        before, more = held[:, rows], counts[:, known]
        share = (more / (before + more).clamp(min=1))[..., None]
        merged = prototypes[:, rows] + share * (means[:, known] - prototypes[:, rows])
        prototypes, held = prototypes.index_copy(1, rows, merged), held.index_copy(1, rows, before + more)
    arrived = torch.full((int(new.sum()),), state.n_tasks, device=state.task_of_class.device)
    return replace(
        state,
        prototypes=torch.cat([prototypes, means[:, new]], 1),
        counts=torch.cat([held, counts[:, new]], 1),
        task_of_class=torch.cat([state.task_of_class, arrived]),
        n_tasks=state.n_tasks + 1,
    )


def continual_targets(sequence: Sequence[Episode], shared_classes: bool = False) -> list[Tensor]:
    """For each t, (B, (t + 1) * Q) columns of `unroll`'s logits; classes of task i stand behind those of task i - 1.

    Args:
        shared_classes: all tasks have the same classes (mini-batches of one task).
    """
    targets: list[Tensor] = []
    offset = 0
    for episode in sequence:
        assert episode.query_y is not None
        targets.append(episode.query_y + (0 if shared_classes else offset))
        offset += episode.n_max
    return [torch.cat(targets[: t + 1], 1) for t in range(len(targets))]


def continual_loss(
    logits: Sequence[Tensor], targets: Sequence[Tensor], weighting: Literal["all", "last", "current+last"] = "all"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all prefixes of a sequence.

    Args:
        logits: for each t, (B, (t + 1) * Q, P); see `ContinualHyperTransformer.unroll`.
        targets: for each t, (B, (t + 1) * Q).
        weighting: "all": the mean over prefixes of the mean over their tasks, so that late prefixes do not drown early ones;
            "last": the last prefix alone; "current+last": the newest task of every prefix, and all of the last one.

    Returns:
        The loss, and (T, T) losses of task i after task t, NaN above the diagonal.
    """
    n_tasks = len(logits)
    table = logits[0].new_full((n_tasks, n_tasks), torch.nan)
    losses: list[list[Tensor]] = []
    for t, (answer, target) in enumerate(zip(logits, targets, strict=True)):
        each = nn.functional.cross_entropy(answer.flatten(0, 1), target.flatten(), reduction="none").view(len(target), t + 1, -1)
        row = each.mean((0, 2))
        losses.append(list(row.unbind()))
        table[t, : t + 1] = row.detach()
    prefixes = [torch.stack(row).mean() for row in losses]
    if weighting == "all":
        return torch.stack(prefixes).mean(), table
    if weighting == "last":
        return prefixes[-1], table
    if weighting == "current+last":
        return 0.5 * (torch.stack([row[-1] for row in losses]).mean() + prefixes[-1]), table
    raise SettingError(f"continual_loss: weighting='{weighting}' is unknown; give 'all', 'last' or 'current+last'.")
