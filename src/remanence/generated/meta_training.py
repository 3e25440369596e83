"""Meta-training as an artifact: a HyperTransformer learns from episodes of one source how to write weights, and becomes a folder.

    folder = materialise(MetaTrainedHyperTransformer(omniglot(), steps=3000))
    model = load_hypertransformer(folder)

A share of the classes is never trained on: every `every` steps the model answers the same episodes of these, and the folder holds the
model that answered best. Beside it stands training.json with the curve. An interrupted training goes on from its last validation and
ends with the same bits.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from remanence.artifact import Artifact
from remanence.errors import DataError, NonFiniteLoss, SettingError
from remanence.generated.continual import ContinualHyperTransformer, Update
from remanence.generated.continual_loss import continual_loss, continual_targets
from remanence.generated.episode import Episode
from remanence.generated.files import save_hypertransformer
from remanence.generated.hypertransformer import Head, HyperTransformer
from remanence.generated.meta_trainer import MetaTrainer, episode_loss, warm_up_share
from remanence.generated.sampling import EpisodeSampler, Range, SequenceSampler
from remanence.generated.target import Norm, TargetNet
from remanence.keys import generator, key_seed, keyed_rng
from remanence.learner import Progress
from remanence.state import all_finite, copy_state, load_state, save_state, state_bytes, write_whole
from remanence.streams import Source

_CHECKPOINT, _REPORT = "training.safetensors", "training.json"
_VALIDATION_TASKS = 200
"""Tasks or sequences that a validation answers, some 5,000 queries at the defaults; a last draw may bring some more."""


class MetaTrained(Artifact):
    """What the meta-trained models share: held-out classes, the loop, the best checkpoint.

    Args:
        source: its images are drawn from, train and test rows alike; square.
        n_needed: classes of the largest task or sequence.
        steps, lr: of `MetaTrainer`.
        valid_share: share of the classes that are only validated on, between 0 and 1; never fewer than a task or sequence needs.
        every: steps from one validation to the next; each leaves a checkpoint.
        patience: stop after so many validations in a row without a better one; 0 never stops.
        seed: key of initialisation, held-out classes and episodes.
    """

    def __init__(
        self, source: Source, n_needed: int, steps: int, lr: float, valid_share: float, every: int, patience: int, seed: int
    ) -> None:  # fmt: skip
        if not 0 < valid_share < 1:
            raise SettingError(f"{type(self).__name__}: valid_share={valid_share} must lie between 0 and 1: both sides need classes.")
        for name, value, least in (("steps", steps, 1), ("every", every, 1), ("patience", patience, 0)):
            if value < least:
                raise SettingError(f"{type(self).__name__}: {name}={value} must be {least} or more.")
        if lr <= 0:
            raise SettingError(f"{type(self).__name__}: lr={lr} must be above 0.")
        self.source, self.steps, self.lr, self.seed = source, steps, lr, seed
        self.valid_share, self.every, self.patience = valid_share, every, patience
        self.trained_on, self.validated_on = _held_out_classes(source, n_needed, valid_share, seed)

    # --- what a model is and how it learns ---------------------------------------------------------------------

    @abstractmethod
    def make(self) -> HyperTransformer:
        """The untrained model."""

    @abstractmethod
    def loss(self, model: Any, step: int) -> tuple[Tensor, int]:
        """The loss of a training step, and how many images it read."""

    @abstractmethod
    def accuracies(self, model: Any, draw: int) -> Tensor:
        """(B,) share of right answers of each task of a validation draw."""

    # --- artifact ----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        chosen = {name: value for name, value in plain.items() if isinstance(value, int | float | str | list)}
        return {"data": self.source.fingerprint(), **chosen}

    def seen(self) -> Tensor:
        return self.source.ids

    def header(self) -> dict[str, Any]:
        return {"name": self.source.name, "classes": list(self.source.classes)}

    def sketch(self, folder: Path) -> None:
        save_hypertransformer(self.make(), folder)
        write_whole(folder / "header.json", json.dumps(self.header()))

    def build(self, folder: Path) -> Iterator[Progress]:
        model = self.make()
        trainer = MetaTrainer(model.parameters(), self.steps, self.lr, model.cnn_parameters())
        curve: list[dict[str, float]] = []
        best = copy_state(dict(model.state_dict()))
        if (folder / _CHECKPOINT).exists():
            state = load_state(folder / _CHECKPOINT)
            model.load_state_dict(state["model"])
            trainer.load_state_dict(state["trainer"])
            curve, best = state["curve"], state["best"]
        while trainer.step < self.steps and not self.has_settled(curve):
            with torch.enable_grad():
                loss, n_examples = self.loss(model, trainer.step)
                loss = trainer.update(loss)
            if trainer.step % self.every == 0 or trainer.step == self.steps:
                curve.append({"step": trainer.step, "loss": loss.item(), "valid_accuracy": self._validate(model, trainer.step)})
                if _best(curve) == len(curve) - 1:
                    best = copy_state(dict(model.state_dict()))
                state = {"model": dict(model.state_dict()), "trainer": trainer.state_dict(), "curve": curve, "best": best}
                save_state(folder / _CHECKPOINT, state)
            yield Progress(trainer.step, self.steps, loss, n_examples)
        model.load_state_dict(best)
        self._save(model, curve, folder)

    def has_settled(self, curve: list[dict[str, float]]) -> bool:
        """Whether the last `patience` validations brought nothing better."""
        return bool(self.patience and curve) and len(curve) - 1 - _best(curve) >= self.patience

    @torch.no_grad()
    def _validate(self, model: HyperTransformer, step: int) -> float:
        if not all_finite(dict(model.state_dict())):
            raise NonFiniteLoss(f"{type(self).__name__}: parameters are no longer finite at step {step} with lr={self.lr}; lower lr.")
        accuracies = self.accuracies(model, 0)
        for draw in range(1, math.ceil(_VALIDATION_TASKS / len(accuracies))):
            accuracies = torch.cat([accuracies, self.accuracies(model, draw)])
        return accuracies.mean().item()

    def _save(self, model: HyperTransformer, curve: list[dict[str, float]], folder: Path) -> None:
        best = curve[_best(curve)]
        report = {
            "valid_accuracy": best["valid_accuracy"], "best_step": best["step"], "steps": curve[-1]["step"],
            "stopped_early": curve[-1]["step"] < self.steps, "n_parameters": sum(value.numel() for value in model.parameters()),
            "bytes": state_bytes(dict(model.state_dict())), "n_trained_classes": len(self.trained_on.classes),
            "validated_on": [self.source.class_names[label] for label in self.validated_on.classes], "curve": curve,
        }  # fmt: skip
        about = {"trained_on": self.source.name, "valid_accuracy": best["valid_accuracy"], "step": best["step"]}
        save_hypertransformer(model, folder, about)
        write_whole(folder / _REPORT, json.dumps(report, indent=1))
        (folder / _CHECKPOINT).unlink()  # last: what is lost before this line is made again from it


class MetaTrainedHyperTransformer(MetaTrained):
    """A HyperTransformer that learned to write weights from episodes of one source.

    3,000 steps at the defaults take about four minutes on one core; such a model has 0.3 million parameters.

    Args:
        source: as all of `steps`, `lr`, `valid_share`, `every`, `patience` and `seed`: see `MetaTrained`.
        channels, n_layers, norm: of the target CNN. "group" answers every query by itself; with "batch" queries are normalised together.
        head, max_ways, label_codes, width, depth: of the `HyperTransformer`.
        ways, shots, queries, tasks, unlabeled, quarter_turns: of the `EpisodeSampler`; validation draws like training, untouched
            classes upright.

    Raises:
        SettingError: a setting is out of range, or the classes do not suffice on one of both sides.
        DataError: the images are not square, or a class has too few of them.

    Source: Zhmoginov, Sandler and Vladymyrov 2022 (arXiv 2201.04182). ours: the choice of the best checkpoint.
    """

    kind = "hypertransformer"

    def __init__(
        self, source: Source, channels: int = 8, n_layers: int = 4, norm: Norm = "group", head: Head = "proto+delta", max_ways: int = 20,
        label_codes: Literal["learned", "random"] = "random", width: int = 48, depth: int = 2, ways: Range = (2, 10), shots: Range = (1, 5),
        queries: int = 4, tasks: int = 8, unlabeled: int = 0, quarter_turns: bool = False, steps: int = 3000, lr: float = 5e-4,
        valid_share: float = 0.15, every: int = 200, patience: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(source, _most(ways), steps, lr, valid_share, every, patience, seed)
        self.channels, self.n_layers, self.norm, self.head = channels, n_layers, norm, head
        self.max_ways, self.label_codes, self.width, self.depth = max_ways, label_codes, width, depth
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        self.unlabeled, self.quarter_turns = unlabeled, quarter_turns
        self.target = _target(source, channels, n_layers, norm)
        drawn = (ways, shots, queries, tasks, unlabeled)
        _require_ways(max_ways, ways)
        self._train = EpisodeSampler(self.trained_on, *drawn, quarter_turns=quarter_turns, seed=seed)
        self._valid = EpisodeSampler(self.validated_on, *drawn, seed=key_seed(seed, "validation"))

    def make(self) -> HyperTransformer:
        with keyed_rng(self.seed, "initialise"):
            return HyperTransformer(
                self.target, head=self.head, max_ways=self.max_ways, label_codes=self.label_codes, width=self.width, depth=self.depth
            )

    def loss(self, model: Any, step: int) -> tuple[Tensor, int]:
        episode = self._train.sample(step)
        logits, by_means = model.answers(episode, generator(self.seed, "codes", step))
        loss = episode_loss(logits, episode)
        if self.head == "generated":
            loss = loss + warm_up_share(step, self.steps) * episode_loss(by_means, episode)
        return loss, _n_images(episode)

    def accuracies(self, model: Any, draw: int) -> Tensor:
        episode = self._valid.sample(draw)
        answers = model(episode, generator(self.seed, "validation codes", draw)).argmax(-1)
        shares: Tensor = (answers == episode.query_y).double().mean(1)
        return shares


class MetaTrainedContinualHyperTransformer(MetaTrained):
    """A continual HyperTransformer that learned from sequences of tasks to learn the next one and keep the earlier ones.

    Its accuracy is that over the queries of all tasks after the last one.

    Args:
        source: as all of `steps`, `lr`, `valid_share`, `every`, `patience` and `seed`: see `MetaTrained`.
        channels, n_layers: of the target CNN, whose norm is "group".
        max_ways, label_codes, width, depth, scenario, update: of the `ContinualHyperTransformer`.
        n_tasks, ways, shots, queries, sequences, quarter_turns: of the `SequenceSampler`; validation draws like training, untouched
            classes upright.

    Raises:
        SettingError: a setting is out of range, or the classes do not suffice on one of both sides.
        DataError: the images are not square, or a class has too few of them.

    Source: Vladymyrov, Zhmoginov and Sandler 2023 (arXiv 2301.04584). ours: the choice of the best checkpoint.
    """

    kind = "continual-hypertransformer"

    def __init__(
        self, source: Source, channels: int = 8, n_layers: int = 4, max_ways: int = 20,
        label_codes: Literal["learned", "random"] = "learned", width: int = 48, depth: int = 2,
        scenario: Literal["class", "task"] = "class", update: Update = "add", n_tasks: Range = 3, ways: int = 5, shots: int = 1,
        queries: int = 5, sequences: int = 6, quarter_turns: bool = False, steps: int = 1500, lr: float = 1e-3,
        valid_share: float = 0.15, every: int = 200, patience: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(source, _most(n_tasks) * ways, steps, lr, valid_share, every, patience, seed)
        self.channels, self.n_layers, self.max_ways, self.label_codes = channels, n_layers, max_ways, label_codes
        self.width, self.depth, self.scenario, self.update = width, depth, scenario, update
        self.n_tasks, self.ways, self.shots, self.queries = n_tasks, ways, shots, queries
        self.sequences, self.quarter_turns = sequences, quarter_turns
        self.target = _target(source, channels, n_layers, "group")
        drawn = (n_tasks, ways, shots, queries, sequences)
        _require_ways(max_ways, ways)
        self._train = SequenceSampler(self.trained_on, *drawn, quarter_turns=quarter_turns, seed=seed)
        self._valid = SequenceSampler(self.validated_on, *drawn, seed=key_seed(seed, "validation"))

    def make(self) -> ContinualHyperTransformer:
        with keyed_rng(self.seed, "initialise"):
            return ContinualHyperTransformer(
                self.target, self.scenario, self.update, max_ways=self.max_ways, label_codes=self.label_codes, width=self.width,
                depth=self.depth,
            )  # fmt: skip

    def loss(self, model: Any, step: int) -> tuple[Tensor, int]:
        sequence = self._train.sample(step)
        logits = model.unroll(sequence, generator(self.seed, "codes", step))
        return continual_loss(logits, continual_targets(sequence))[0], sum(map(_n_images, sequence))

    def accuracies(self, model: Any, draw: int) -> Tensor:
        sequence = self._valid.sample(draw)
        logits = model.unroll(sequence, generator(self.seed, "validation codes", draw))[-1]
        shares: Tensor = (logits.argmax(-1) == continual_targets(sequence)[-1]).double().mean(1)
        return shares


def _held_out_classes(source: Source, n_needed: int, share: float, seed: int) -> tuple[Source, Source]:
    """The source of the classes that are trained on, and that of the others."""
    labels = torch.tensor(source.classes)
    order = labels[torch.randperm(len(labels), generator=generator(seed, "held-out classes"))]
    n_held = max(round(share * len(labels)), n_needed)
    if n_held >= len(labels):
        raise SettingError(
            f"'{source.name}' has {len(labels)} classes; valid_share={share} and tasks of {n_needed} classes leave none to train on. "
            f"Lower ways or n_tasks, or give more classes."
        )
    is_held = torch.isin(source.labels, order[:n_held])
    trained, held = source.select(~is_held), source.select(is_held)
    return replace(trained, name=f"{source.name} to train on"), replace(held, name=f"{source.name} to validate on")


def _target(source: Source, channels: int, n_layers: int, norm: Norm) -> TargetNet:
    _, in_channels, side, width = source.images.shape
    if side != width:
        raise DataError(f"'{source.name}': images of {side} x {width} pixels; the target CNN takes square ones.")
    return TargetNet(channels, in_channels, side, n_layers, norm)


def _require_ways(max_ways: int, ways: Range) -> None:
    if _most(ways) > max_ways:
        raise SettingError(f"ways={ways} asks for up to {_most(ways)} classes, max_ways={max_ways}; raise max_ways.")


def _most(bounds: Range) -> int:
    return bounds if isinstance(bounds, int) else max(bounds)


def _n_images(episode: Episode) -> int:
    return len(episode) * (episode.support_x.shape[1] + episode.query_x.shape[1])


def _best(curve: list[dict[str, float]]) -> int:
    """Row of the best validation; of equal ones the first."""
    accuracies = [row["valid_accuracy"] for row in curve]
    return accuracies.index(max(accuracies))
