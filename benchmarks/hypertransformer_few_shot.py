"""Few-shot cells of the HyperTransformer benchmark: H1 to H7.

Every arm has the same small CNN, trains on the same episodes of the background split (four turns of every class, 8 tasks a step, 15
queries a class) with the same schedule, and answers the same 600 untouched episodes of the evaluation split. Settings are chosen on
alphabets held out of the background split: on characters of the alphabets trained on, overfitting would not show.

Axes: B tasks, Q queries, S support.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from hypertransformer_baselines import ProtoNet, accuracy
from hypertransformer_cells import Result
from hypertransformer_maml import MAML
from torch import Tensor, nn

from remanence.generated.episode import UNLABELED, Episode
from remanence.generated.heads import class_means, squared_distances
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.meta_trainer import MetaTrainer, episode_loss, warm_up_share
from remanence.generated.sampling import EpisodeSampler
from remanence.generated.target import TargetNet
from remanence.keys import generator, keyed_rng
from remanence.streams import Source, omniglot

TEST_SEED, TEST_TASKS, TEST_EPISODES = 12345, 50, 600
HEAD = "prototype"
"""Of the HyperTransformer in H1, H2, H5 and H7: the class means under the written trunk."""
DELTA_HEAD = "proto+delta"
"""Of both arms of H3, so that the logits-only arm generates something."""


@cache
def background() -> Source:
    return omniglot("background")


@cache
def evaluation() -> Source:
    return omniglot("evaluation")


@cache
def tuning_halves() -> tuple[Source, Source]:
    """Background alphabets to train on while settings are chosen, and those that choose: every fifth."""
    source = background()
    alphabet = {label: name.rsplit(" ", 1)[0] for label, name in source.class_names.items()}
    choosing = set(sorted(set(alphabet.values()))[::5])
    held_out = torch.isin(source.labels, torch.tensor([label for label, name in alphabet.items() if name in choosing]))
    return source.select(~held_out), source.select(held_out)


def make(arm: str, channels: int, ways: int) -> nn.Module:
    """A model of the benchmark; its initialisation draws from the global generator."""
    target = TargetNet(channels)
    if arm == "proto":
        return ProtoNet(target)
    if arm == "maml":
        return MAML(target, ways, steps=5)
    generate = "logits" if "logits" in arm else "all"
    head = DELTA_HEAD if "delta" in arm or "logits" in arm else "generated" if "written" in arm else HEAD
    return HyperTransformer(target, generate, head, max_ways=ways, preset="paper" if arm == "ht-paper" else None)


def few_shot(
    arm: str, seed: int, steps: int, lr: float, channels: int = 8, ways: int = 5, shots: int = 1, tasks: int = 8, tuning: bool = False,
    cnn_lr: float | None = None, cpu_seconds: float | None = None, episodes: int = TEST_EPISODES,
) -> tuple[nn.Module, Result]:  # fmt: skip
    """Train an arm, and measure it with both statistics."""
    train, test = tuning_halves() if tuning else (background(), evaluation())
    sampler = EpisodeSampler(train, ways, shots, queries=15 if ways == 5 else 5, tasks=tasks, quarter_turns=True, seed=seed)
    model = fresh(lambda: make(arm, channels, ways), seed)

    def loss(model: nn.Module, step: int) -> Tensor:
        episode = sampler.sample(step)
        return episode_loss(model(episode), episode)

    figures = train_model(model, loss, steps, lr, cnn_lr, cpu_seconds)
    tests = EpisodeSampler(test, ways, shots, queries=15, tasks=TEST_TASKS, seed=TEST_SEED)
    found = {mode: answered(model, tests, mode, episodes) for mode in ("query", "support")}
    if isinstance(model, HyperTransformer) and model.written:
        figures["variation"] = model.episode_variation(tests.sample(0))
    return model, figures | {"accuracy": found}


def fresh(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with keyed_rng(seed, "initialise"):
        return build()


def train_model(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int, lr: float, cnn_lr: float | None = None,
    cpu_seconds: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train for so many steps, or for as many as the CPU seconds hold; says what it took."""
    if cpu_seconds is not None:
        steps = max(50, int(cpu_seconds / seconds_per_step(model, loss)))
    trainer, start = trainer_of(model, steps, lr, cnn_lr), time.process_time()
    recent = 0.0
    for step in range(steps):
        recent = 0.98 * recent + 0.02 * trainer.update(loss(model, step)).item()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"steps": steps, "cpu_seconds": time.process_time() - start, "loss": recent, "parameters": n_parameters}


def trainer_of(model: nn.Module, steps: int, lr: float, cnn_lr: float | None) -> MetaTrainer:
    """One schedule for all; `cnn_lr` is the rate of the numbers that stand in a HyperTransformer's small CNN."""
    if cnn_lr is None:
        return MetaTrainer(model.parameters(), steps, lr)
    assert isinstance(model, HyperTransformer)
    return MetaTrainer(model.parameters(), steps, lr, model.cnn_parameters(), cnn_lr)


def seconds_per_step(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], n_steps: int = 40) -> float:
    """CPU seconds of a step, from a few that leave no trace."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = MetaTrainer(model.parameters(), n_steps)
    for step in range(5):
        trainer.update(loss(model, step))
    start = time.process_time()
    for step in range(n_steps):
        trainer.update(loss(model, step))
    taken = (time.process_time() - start) / n_steps
    model.load_state_dict(before)
    return taken


@torch.no_grad()
def answered(model: nn.Module, tests: EpisodeSampler, bn_stats: str, episodes: int) -> float:
    """Mean accuracy over the test episodes."""
    before, model.bn_stats = model.bn_stats, bn_stats  # type: ignore[assignment]
    hits = []
    for index in range(episodes // TEST_TASKS):
        episode = tests.sample(index)
        hits.append(accuracy(model(episode), episode).mean())
    model.bn_stats = before
    return torch.stack(hits).mean().item()


# --- H6: unlabelled images -----------------------------------------------------------------------------------------


def semi_supervised(
    arm: str, seed: int, steps: int, lr: float, depth: int, cnn_lr: float | None = None, cpu_seconds: float | None = None
) -> tuple[nn.Module, Result]:
    """A generated head with four unlabelled images a class: accuracy with them, and of the same net with them masked out."""
    sampler = EpisodeSampler(background(), 5, 1, queries=10, tasks=8, unlabeled=4, quarter_turns=True, seed=seed)
    model = fresh(
        lambda: HyperTransformer(TargetNet(8, norm="group"), head="generated", max_ways=5, label_codes="random", depth=depth), seed
    )

    def loss(model: nn.Module, step: int) -> Tensor:
        draw = generator(seed, "codes", step)
        share = max(0.0, 2 * float(torch.rand((), generator=draw)) - 1)  # half of the steps show all
        episode = thinned(sampler.sample(step), share, draw)
        written, by_means = model.answers(episode, draw)  # type: ignore[operator]
        return episode_loss(written, episode) + warm_up_share(step, steps) * episode_loss(by_means, episode)

    figures = train_model(model, loss, steps, lr, cnn_lr)
    tests = EpisodeSampler(evaluation(), 5, 1, queries=15, tasks=TEST_TASKS, unlabeled=4, seed=TEST_SEED)
    with_them, without = [], []
    with torch.no_grad():
        for index in range(TEST_EPISODES // TEST_TASKS):
            episode = tests.sample(index)
            bare = thinned(episode, 1.0, generator(0))
            with_them.append(accuracy(model(episode), episode).mean())
            without.append(accuracy(model(bare), bare).mean())
    return model, figures | {"with": torch.stack(with_them).mean().item(), "without": torch.stack(without).mean().item()}


def thinned(episode: Episode, share: float, draw: torch.Generator) -> Episode:
    """The episode with each unlabelled sample masked out with probability `share`; at 1, all of them."""
    gone = (episode.support_y == UNLABELED) & (torch.rand(episode.support_y.shape, generator=draw) < share)
    return replace(episode, support_mask=~gone)


# --- H7: whose images wrote the kernels? -----------------------------------------------------------------------------


@torch.no_grad()
def swapped_tasks(model: HyperTransformer, episodes: int = TEST_EPISODES) -> Result:
    """Class means and queries of a task under kernels written for another: its accuracy, and that under its own."""
    tests = EpisodeSampler(evaluation(), 5, 1, queries=15, tasks=TEST_TASKS, seed=TEST_SEED)
    own, other = [], []
    for index in range(episodes // TEST_TASKS):
        episode = tests.sample(index)
        trunk = model.generate(episode.support_x, episode.support_y).tensors
        shifted = {name: value.roll(1, 0) for name, value in trunk.items()}
        own.append(_by_means(model, episode, trunk))
        other.append(_by_means(model, episode, shifted))
    variation = model.episode_variation(tests.sample(0))
    return {"own": torch.stack(own).mean().item(), "other": torch.stack(other).mean().item(), "variation": variation}


def _by_means(model: HyperTransformer, episode: Episode, tensors: dict[str, Tensor]) -> Tensor:
    support, queries = (model.target.embed(x, tensors) for x in (episode.support_x, episode.query_x))
    means, _ = class_means(support, episode.support_y, episode.n_max)
    return accuracy(-squared_distances(queries, means), episode).mean()
