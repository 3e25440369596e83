"""Continual HyperTransformer: the weights it wrote for one task are what it starts from at the next.

    model = ContinualHyperTransformer(TargetNet(norm="group"))
    state = model.init_state()
    state = model.step(state, support_x, support_y, class_names=["oak", "elm"])     # pure: the old state stays valid
    logits = model.predict(state, x)                                                # over all classes seen, state.class_names

State between tasks: the slices of every layer, and one class mean per class, laid down with the weights of its own time and never
recomputed. No image is kept and no gradient is taken. What makes this a memory is the training: the weights after task t must still
send images of earlier tasks near the means that earlier weights laid down. A state takes in more tasks than the training unrolled.

Baselines are uses of it: `carry=False` ("NoCarry") drops the recurrence; one `step` with the union of all supports is "MergedHT";
keeping the state after every task, and asking each its own, is "MultiHT".

Source: Vladymyrov, Zhmoginov and Sandler 2023, "Continual HyperTransformer" (arXiv 2301.04584). ours: a learned start, `update="add"`,
    a learned temperature, and a norm over single images: batch statistics would tell which task a query comes from.

Axes: B sequences, T tasks, S support samples, N images, n ways, P classes held, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from remanence.errors import DataError, SettingError
from remanence.generated import _continual_checks as checks
from remanence.generated._continual_classes import OnRepeat, among, names_after, repeats, slots_of_names, usual_slots, with_classes
from remanence.generated._hyper_checks import blanked
from remanence.generated.continual_loss import accuracy_table, continual_loss, continual_targets
from remanence.generated.continual_state import ContinualState, UnknownTask
from remanence.generated.episode import Episode
from remanence.generated.heads import class_means, linear, squared_distances
from remanence.generated.hypertransformer import HyperTransformer, Slices
from remanence.generated.support import Support
from remanence.generated.target import TargetNet

__all__ = [
    "ContinualHyperTransformer",
    "ContinualState",
    "Scenario",
    "UnknownTask",
    "Update",
    "accuracy_table",
    "continual_loss",
    "continual_targets",
]

Scenario = Literal["class", "task", "minibatch"]
Update = Literal["add", "replace", "gate"]


class ContinualHyperTransformer(HyperTransformer):
    """A HyperTransformer whose weight tokens read what the slices held before.

    Args:
        target: with norm="group". With "batch" the answers are transductive: each depends on the other images of its batch, and a
            batch of one task tells which task it is.
        scenario: who is asked. "class": all classes seen; "task": those of a named task; "minibatch": the classes are the same in
            every step, and their means grow more exact.
        update: "add" what is written to what was held, "replace" all that was held by the learned start plus what is written, or
            "gate": a learned share of each slice is replaced, half of it at first.
        carry: False gives every task the learned start instead of what was held: the ablation without recurrence.
        renorm: give every slice the length of its learned start; the norm behind a convolution makes length meaningless.
        head: "prototype", or "generated": a written last layer is carried too and no class mean is used.
        settings: of `HyperTransformer`.

    Raises:
        SettingError: a setting is unknown or contradicts another.
    """

    reads_previous = True
    written_share = 0.1  # at the start a task leaves nearly all as it was

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

    @property
    def has_fixed_columns(self) -> bool:
        """Whether slot j of every task is class j, so that a task need not show all its classes."""
        return self.head == "generated" or self.scenario == "minibatch"

    # --- state -------------------------------------------------------------------------------------------------

    def init_state(self, batch: int = 1) -> ContinualState:
        """The state before any task, for `batch` sequences: the learned start, and no class."""
        start = self.base["conv1"]
        slices = {name: value.expand(batch, self._n_slices(name), -1) for name, value in self.base.items()}
        n_classes = self.max_ways if self.head == "generated" else 0
        return ContinualState(
            slices, start.new_zeros(batch, n_classes, self.target.embedding_width), start.new_zeros(batch, n_classes),
            torch.full((n_classes,), -1, device=start.device), 0, {},
        )  # fmt: skip

    def _n_slices(self, name: str) -> int:
        return self.max_ways if name == "logits" else len(self.base[name])

    def step(
        self, state: ContinualState, support_x: Tensor, support_y: Tensor, mask: Tensor | None = None, slots: Tensor | None = None,
        draw: torch.Generator | None = None, *, class_names: Sequence[str] = (), on_repeat: OnRepeat = "merge",
    ) -> ContinualState:  # fmt: skip
        """Take one task (or mini-batch) in; returns a new state and leaves the old one as it was.

        Call it under `torch.no_grad()` where nothing is trained: otherwise each state keeps the graph of all before it.

        Args:
            state: what is held, for B sequences.
            support_x: (B, S, C, H, W).
            support_y: (B, S) int64 slots 0..n-1 of this task, or `UNLABELED`: read by the weights, and part of no class mean.
            mask: (B, S) bool, True = present.
            slots: (n,) or (B, n) int64, which held class each slot is; -1 for a new one. By default all are new, except in scenario
                "minibatch" and with a generated head, where slot j is class j.
            draw: with random label codes, what they are drawn from; the same codes in every step by default.
            class_names: of the slots, in place of `slots`: in scenario "class" a name that is held is that class. Name the classes
                of every task or of none.
            on_repeat: what the mean of a held class becomes: that of all its samples ("merge"), of the new ones ("replace"), or an
                "error".

        Raises:
            DataError: shapes, labels, slots, names or pixels are wrong; a class has no sample, though its column is not fixed; a
                held class comes with on_repeat="error"; the new weights or means are not finite.
            SettingError: on_repeat is unknown, or both slots and names are given.
            StateMismatchError: a model of other layers made the state.

        Warns:
            UserWarning: some layer's weights have just grown beyond 10 times their learned start.
        """
        if on_repeat not in ("merge", "replace", "error"):
            raise SettingError(f"step: on_repeat={on_repeat!r} is unknown; give 'merge', 'replace' or 'error'.")
        if slots is not None and class_names:
            raise SettingError("step: slots and class_names both say which class is which; give one of them.")
        checks.require_images(self, state, support_x)
        names = checks.require_names(class_names)
        ways = support_y.new_full((len(support_x) if names else 0,), len(names))
        episode = Episode(support_x, support_y, support_x[:, :0], support_mask=mask, ways=ways, allow_empty=True)
        if not self.has_fixed_columns:
            checks.require_shown(episode, names)
        if slots is not None:
            checks.require_slots(self, state, slots, episode.n_max)
        else:
            slots = self._slots(state, episode, names)
        names = names_after(state, names, slots, self.has_fixed_columns)
        after = self._take_in(state, episode, slots, self._codes(len(support_x), draw), on_repeat)
        checks.require_sound(self, state, after)
        return replace(after, class_names=names)

    def _slots(self, state: ContinualState, episode: Episode, names: tuple[str, ...] = ()) -> Tensor:
        if names and self.scenario == "class" and not self.has_fixed_columns:
            return slots_of_names(state, names)
        return usual_slots(state, episode.n_max, self.has_fixed_columns)

    def _take_in(
        self, state: ContinualState, episode: Episode, slots: Tensor, codes: Tensor | None, on_repeat: OnRepeat = "merge"
    ) -> ContinualState:
        x = blanked(episode.support_x, episode.support_mask)
        support = self.read(x, episode.support_y, episode.support_mask, episode.n_max, codes)
        previous = state.slices if self.carry else self.init_state(len(x)).slices
        tensors, embeddings, held = self.trunk(x, support, previous)
        if self.head == "generated":
            written = self.write_head(embeddings, replace(support, n_ways=self.max_ways), previous["logits"])
            held["logits"] = self._join("logits", previous["logits"], written)
            tensors |= _last_layer(held["logits"])
        means, counts = class_means(embeddings, support.labels, support.n_ways, support.mask)
        return with_classes(replace(state, slices=held, tensors=tensors), means, counts, slots, on_repeat)

    def update(self, name: str, features: Tensor, support: Support, previous: Tensor | None) -> Tensor:
        if previous is None:
            previous = self.base[name].expand(len(features), -1, -1)
        written = self.generators[name](features, support.labels, support.mask, support.codes, previous)
        return self._join(name, previous, self.lengths(name) * written)

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

    def growth(self, state: ContinualState) -> dict[str, float]:
        """For each convolution, the norm of its slices over that of its learned start; the largest of the sequences."""
        with torch.no_grad():
            starts = {name: self.base[name].norm() for name in self.target.conv_names}
            return {name: (state.slices[name].flatten(1).norm(dim=1).max() / start).item() for name, start in starts.items()}

    def tensors_of(self, slices: Slices) -> dict[str, Tensor]:
        """The CNN that slices (B, T, b) stand for, without recorded statistics."""
        tensors: dict[str, Tensor] = {}
        for name in self.target.conv_names:
            gamma, beta = (values[name].expand(len(slices[name]), -1) for values in (self.gamma, self.beta))
            kernel, gamma, beta = self._parse(name, slices[name], gamma, beta)
            tensors |= {f"{name}.weight": kernel, f"{name}.gamma": gamma, f"{name}.beta": beta}
        return tensors | (_last_layer(slices["logits"]) if self.head == "generated" else {})

    # --- answers -----------------------------------------------------------------------------------------------

    def embed(self, state: ContinualState, x: Tensor) -> Tensor:
        """Images (B, N, C, H, W) -> embeddings (B, N, D) under the newest weights."""
        return self.target.embed(x, state.tensors, self.bn_stats)

    def predict(self, state: ContinualState, x: Tensor, task: int | None = None) -> Tensor:
        """Images (B, N, C, H, W) -> logits (B, N, P) over the classes held; -inf outside of `task` where one is named.

        Args:
            task: number of the task in which the classes came, counted from 0. Scenario "task" needs it; elsewhere it restricts the
                answer, which makes the question easier: say so beside the number.

        Raises:
            DataError: nothing was learned yet; images are wrong; a task must be named.
            UnknownTask: no class came in that task (also a KeyError).
            StateMismatchError: a model of other layers made the state.
        """
        checks.require_question(self, state, x, task)
        return self._answer(self.embed(state, x), state, task)

    def _answer(self, embeddings: Tensor, state: ContinualState, task: int | None = None) -> Tensor:
        if self.head == "generated":
            return among(linear(embeddings, state.tensors), state, task)
        return self.answer(embeddings, state, task)

    def answer(self, embeddings: Tensor, state: ContinualState, task: int | None = None) -> Tensor:
        """Embeddings (B, N, D) -> logits (B, N, P): minus the scaled squared distance to each class mean."""
        return among(-self.log_scale.exp() * squared_distances(embeddings, state.prototypes), state, task)

    def head_and_means(self, state: ContinualState, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N, P) of a generated head, and those of the class means on the same embeddings; see `HyperTransformer.answers`."""
        embeddings = self.embed(state, x)
        return self._answer(embeddings, state), self.answer(embeddings, state)

    # --- training ----------------------------------------------------------------------------------------------

    def unroll(self, sequence: Sequence[Episode], draw: torch.Generator | None = None) -> list[Tensor]:
        """Take a sequence in and answer, after every task, the queries of all tasks so far.

        In scenario "class" a class that comes again, by the episodes' `class_ids`, is merged with itself.

        Args:
            sequence: T episodes of the same B sequences.

        Returns:
            For each t, logits (B, (t + 1) * Q, P): the queries of task 0 first.

        Raises:
            DataError: there is no task, or the images do not fit.
        """
        answers = []
        for t, state in enumerate(self.states(sequence, draw)):
            answers.append(self._answer_tasks(state, sequence[: t + 1]))
        return answers

    def states(self, sequence: Sequence[Episode], draw: torch.Generator | None = None) -> list[ContinualState]:
        """The state after each task of a sequence, with gradients through the whole recurrence. Arguments and Raises as `unroll`."""
        if not sequence:
            raise DataError("the sequence holds no task; give at least one episode.")
        state, codes = self.init_state(len(sequence[0])), self._codes(len(sequence[0]), draw)
        for episode in sequence:
            checks.require_images(self, state, episode.support_x)
        merges = self.scenario == "class" and self.head == "prototype"
        known = repeats(sequence) if merges else [None] * len(sequence)
        found = []
        for episode, again in zip(sequence, known, strict=True):
            slots = self._slots(state, episode) if again is None else again
            state = self._take_in(state, episode, slots, codes)
            found.append(state)
        return found

    def _answer_tasks(self, state: ContinualState, episodes: Sequence[Episode]) -> Tensor:
        embeddings = self.embed(state, torch.cat([episode.query_x for episode in episodes], 1))
        if self.head == "generated" or self.scenario != "task":
            return self._answer(embeddings, state)
        parts = torch.split(embeddings, [episode.query_x.shape[1] for episode in episodes], 1)
        return torch.cat([self._answer(part, state, task) for task, part in enumerate(parts)], 1)


def _last_layer(slices: Tensor) -> dict[str, Tensor]:
    """Slices (B, n, D + 1) -> the written last layer."""
    return {"logits.weight": slices[..., :-1], "logits.bias": slices[..., -1]}
