"""Continual cells of the HyperTransformer benchmark: C1 to C6 and C8.

Every arm has the same small CNN, normalised per image, and trains on the same sequences of the background split (four turns of every
class); all are measured on the same sequences of the evaluation split. Axes: B sequences, T tasks, Q queries.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from hypertransformer_baselines import ConstPN, multi_ht_task_accuracy
from hypertransformer_cells import Result
from hypertransformer_few_shot import background, evaluation, fresh, train_model, tuning_halves
from hypertransformer_finetuning import fine_tuned_stream
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.generated.continual import ContinualHyperTransformer, accuracy_table, continual_loss, continual_targets
from remanence.generated.episode import Episode
from remanence.generated.meta_trainer import warm_up_share
from remanence.generated.sampling import EpisodeSampler, SequenceSampler
from remanence.generated.target import TargetNet
from remanence.keys import generator
from remanence.streams import Source, digits, fashion_mnist, turned

TEST_SEED, TEST_SEQUENCES, TEST_BATCH = 54321, 200, 20
TRAIN_TASKS, TEST_TASKS = 3, 10


@cache
def domains(test: bool) -> tuple[Source, ...]:
    """Omniglot, clothing and digits, 28 x 28 each. Of the small sets one side has the quarter turns 1 and 2, the other 0 and 3."""
    found = [evaluation() if test else background()]
    for source in (fashion_mnist(n_train=2000, n_test=1000), _enlarged(digits())):
        rows = source.select(source.is_test == test)
        found.append(_joined(rows, turned(rows, (3,))) if test else turned(rows, (1, 2)))
    return tuple(found)


def _enlarged(source: Source) -> Source:
    images = F.interpolate(source.images, size=28, mode="bilinear", align_corners=False).clamp(0, 1)
    return replace(source, images=images)


def _joined(first: Source, second: Source) -> Source:
    columns = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in ("images", "labels", "ids", "is_test")}
    return replace(second, class_names=first.class_names | second.class_names, **columns)


def target() -> TargetNet:
    """Three blocks: the last map has 3 x 3 pixels, and an embedding 72 numbers."""
    return TargetNet(8, n_layers=3, norm="group")


# --- streams of tasks: C2, C3, C4, C6, C8 ----------------------------------------------------------------------------


def make(arm: str) -> nn.Module:
    if arm == "constpn":
        return ConstPN(target())
    return ContinualHyperTransformer(target(), max_ways=5, carry=arm != "nocarry")


def stream(
    arm: str, seed: int, steps: int, lr: float, n_tasks: tuple[int, int] = (TRAIN_TASKS, TRAIN_TASKS), multi: bool = False,
    test_tasks: int = TEST_TASKS, tuning: bool = False, cnn_lr: float | None = None, cpu_seconds: float | None = None,
) -> tuple[nn.Module, Result]:  # fmt: skip
    """Train an arm on sequences of tasks; measure A[t, task], class- and task-incremental, and the drop of an oracle's."""
    train, test = (domains(False), domains(True)) if multi else tuning_halves() if tuning else (background(), evaluation())
    sampler = SequenceSampler(train, n_tasks=tuple(n_tasks), ways=5, shots=1, queries=8, sequences=6, quarter_turns=not multi, seed=seed)
    model = fresh(lambda: make(arm), seed)

    def loss(model: nn.Module, step: int) -> Tensor:
        sequence = sampler.sample(step)
        return continual_loss(model.unroll(sequence), continual_targets(sequence))[0]  # type: ignore[operator]

    figures = train_model(model, loss, steps, lr, cnn_lr, cpu_seconds)
    tests = SequenceSampler(test, n_tasks=test_tasks, queries=10, sequences=TEST_BATCH, seed=TEST_SEED)
    return model, figures | matrices(model, tests)


@torch.no_grad()
def matrices(model: nn.Module, tests: SequenceSampler, n_sequences: int = TEST_SEQUENCES) -> Result:
    """A[t, task] (T, T) over all test sequences: "class" and "task"; NaN above the diagonal."""
    found: dict[str, list[Tensor]] = {"class": [], "task": []}
    growth: list[dict[str, float]] = []
    for index in range(n_sequences // TEST_BATCH):
        sequence = tests.sample(index)
        answers = model.unroll(sequence)  # type: ignore[operator]
        found["class"].append(table(answers, sequence, within=False))
        found["task"].append(table(answers, sequence, within=True))
        if isinstance(model, ContinualHyperTransformer) and index == 0:
            growth = [model.growth(state) for state in model.states(sequence)]
    return {name: torch.stack(each).mean(0).tolist() for name, each in found.items()} | {"growth": growth}


def table(answers: list[Tensor], sequence: tuple[Episode, ...], within: bool) -> Tensor:
    """A[t, task] (T, T) of a batch of sequences; `within` asks among the classes of the query's own task."""
    targets = continual_targets(sequence)
    if within:
        n = sequence[0].n_max
        owners = [torch.arange(logits.shape[2]) // n for logits in answers]
        answers = [
            logits.masked_fill(owner != (target // n)[..., None], -torch.inf)
            for logits, owner, target in zip(answers, owners, targets, strict=True)
        ]
    return accuracy_table(answers, targets).mean(0)


@torch.no_grad()
def orders(model: nn.Module, n_orders: int = 5, n_tasks: int = 5, n_sequences: int = 40) -> list[float]:
    """C8: final class-incremental accuracy of the same tasks in several orders."""
    tests = SequenceSampler(evaluation(), n_tasks=n_tasks, queries=10, sequences=n_sequences, seed=TEST_SEED + 1)
    sequence = tests.sample(0)
    found = []
    for order in range(n_orders):
        places = torch.randperm(n_tasks, generator=generator("order", order)).tolist()
        shuffled = tuple(sequence[place] for place in places)
        found.append(table(model.unroll(shuffled), shuffled, within=False)[-1].mean().item())  # type: ignore[operator]
    return found


def merged(
    arm: str, seed: int, steps: int, lr: float, cnn_lr: float | None = None, cpu_seconds: float | None = None
) -> tuple[nn.Module, Result]:
    """MergedHT: all supports of a sequence at once, which breaks the protocol; the bound that remembering could reach."""
    model = fresh(lambda: ContinualHyperTransformer(target(), max_ways=5 * TRAIN_TASKS), seed)
    settings = {"n_tasks": TRAIN_TASKS, "ways": 5, "shots": 1}
    sampler = SequenceSampler(background(), **settings, queries=8, sequences=6, quarter_turns=True, seed=seed)

    def answered(model: nn.Module, sequence: tuple[Episode, ...]) -> tuple[Tensor, Tensor]:
        episode = united(sequence)
        assert episode.query_y is not None
        return model.unroll([episode])[0], episode.query_y  # type: ignore[operator]

    def loss(model: nn.Module, step: int) -> Tensor:
        logits, y = answered(model, sampler.sample(step))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    figures = train_model(model, loss, steps, lr, cnn_lr, cpu_seconds)
    tests = SequenceSampler(evaluation(), n_tasks=TEST_TASKS, queries=10, sequences=TEST_BATCH, seed=TEST_SEED)
    with torch.no_grad():
        found = [answered(model, tests.sample(index)[:TRAIN_TASKS]) for index in range(TEST_SEQUENCES // TEST_BATCH)]
    return model, figures | {"final": torch.stack([(logits.argmax(-1) == y).float().mean() for logits, y in found]).mean().item()}


def united(sequence: tuple[Episode, ...]) -> Episode:
    """A sequence as one task of all its classes, those of later tasks behind."""
    n, first = sequence[0].n_max, sequence[0]
    return Episode(
        torch.cat([episode.support_x for episode in sequence], 1),
        torch.cat([episode.support_y + n * index for index, episode in enumerate(sequence)], 1),
        torch.cat([episode.query_x for episode in sequence], 1),
        torch.cat([episode.query_y + n * index for index, episode in enumerate(sequence) if episode.query_y is not None], 1),
        ways=torch.full((len(first),), n * len(sequence)),
    )


@torch.no_grad()
def kept_apart(model: nn.Module) -> list[float]:
    """MultiHT: weights of every task kept for ever, each asked among its own classes; accuracy of each task."""
    assert isinstance(model, ContinualHyperTransformer)
    tests = SequenceSampler(evaluation(), n_tasks=TEST_TASKS, queries=10, sequences=TEST_BATCH, seed=TEST_SEED)
    found = [multi_ht_task_accuracy(model, tests.sample(index)[:5]).mean(0) for index in range(TEST_SEQUENCES // TEST_BATCH)]
    return torch.stack(found).mean(0).tolist()


def fine_tuned(model: nn.Module, replay: bool, n_tasks: int = TRAIN_TASKS) -> dict[str, float]:
    """Fine-tuning from the constant embedding along a stream, the best of three rates; final accuracy, class- and task-incremental."""
    assert isinstance(model, ConstPN)
    sequence = SequenceSampler(evaluation(), n_tasks=TEST_TASKS, queries=10, sequences=TEST_BATCH, seed=TEST_SEED).sample(0)[:n_tasks]
    found = []
    for lr in (1e-3, 3e-3, 1e-2):
        start = model.start(TEST_BATCH, 5 * n_tasks)
        tables = fine_tuned_stream(sequence, model.target, start, lr, steps=25, replay=replay)
        found.append((tables.class_incremental[:, -1].mean().item(), tables.task_incremental[:, -1].mean().item()))
    best = max(found)
    return {"class-incremental": round(100 * best[0], 2), "task-incremental": round(100 * best[1], 2)}


# --- mini-batches of one task: C5 --------------------------------------------------------------------------------------


def minibatch(
    arm: str, seed: int, steps: int, lr: float, n_steps: int = 4, cnn_lr: float | None = None, cpu_seconds: float | None = None
) -> tuple[nn.Module, Result]:
    """One task of five classes arrives a shot at a time ("cht", "nocarry"), or all at once ("merged")."""
    model = fresh(lambda: ContinualHyperTransformer(target(), scenario="minibatch", max_ways=5, carry=arm == "cht"), seed)
    sampler = EpisodeSampler(background(), 5, n_steps, queries=8, tasks=4, quarter_turns=True, seed=seed)

    def loss(model: nn.Module, step: int) -> Tensor:
        answers = parts(model, sampler.sample(step), arm)
        return torch.stack([F.cross_entropy(logits.flatten(0, 1), y.flatten()) for logits, y in answers]).mean()

    figures = train_model(model, loss, steps, lr, cnn_lr, cpu_seconds)
    tests = EpisodeSampler(evaluation(), 5, n_steps, queries=15, tasks=TEST_BATCH, seed=TEST_SEED)
    hits: list[list[float]] = []
    with torch.no_grad():
        for index in range(TEST_SEQUENCES // TEST_BATCH):
            hits.append([(logits.argmax(-1) == y).float().mean().item() for logits, y in parts(model, tests.sample(index), arm)])
    return model, figures | {"accuracy": torch.tensor(hits).mean(0).tolist()}


def parts(model: nn.Module, episode: Episode, arm: str) -> list[tuple[Tensor, Tensor]]:
    """Logits of the queries after each mini-batch, with their slots."""
    assert isinstance(model, ContinualHyperTransformer)
    assert episode.query_y is not None
    rows = torch.arange(episode.support_y.shape[1]).unflatten(0, (episode.n_max, -1))
    each = [rows.flatten()] if arm == "merged" else list(rows.T)
    batches = [replace(episode, support_x=episode.support_x[:, part], support_y=episode.support_y[:, part]) for part in each]
    return [(model.predict(state, episode.query_x), episode.query_y) for state in model.states(batches)]


# --- classes in halves, no class means: C1 -----------------------------------------------------------------------------


def head_only(
    arm: str, seed: int, steps: int, lr: float, cnn_lr: float | None = None, cpu_seconds: float | None = None
) -> tuple[nn.Module, Result]:
    """Four classes, two in each of two steps, answered by a generated last layer alone; of what was shown first, what is left?"""
    model = fresh(
        lambda: ContinualHyperTransformer(
            TargetNet(8, norm="group"), scenario="minibatch", head="generated", max_ways=4, carry=arm == "cht", label_codes="random"
        ),
        seed,
    )
    sampler = EpisodeSampler(background(), 4, 1, queries=8, tasks=8, quarter_turns=True, seed=seed)

    def loss(model: nn.Module, step: int) -> Tensor:
        return halves_loss(model, halves(sampler.sample(step)), generator(seed, "codes", step), warm_up_share(step, steps))

    figures = train_model(model, loss, steps, lr, cnn_lr, cpu_seconds)
    return model, figures | remembered(model)


def halves(episode: Episode) -> list[Episode]:
    """A four-way episode as two steps: classes 0 and 1, then 2 and 3."""
    found = []
    for first in (0, 2):
        support, query = (((y[0] >= first) & (y[0] < first + 2)) for y in (episode.support_y, episode.query_y) if y is not None)
        found.append(
            replace(
                episode, support_x=episode.support_x[:, support], support_y=episode.support_y[:, support],
                query_x=episode.query_x[:, query], query_y=None if episode.query_y is None else episode.query_y[:, query], allow_empty=True,
            )
        )  # fmt: skip
    return found


def halves_loss(model: nn.Module, sequence: list[Episode], draw: torch.Generator, warm_up: float) -> Tensor:
    """Cross-entropy after both steps of the generated head, and, fading, of the class means (see `HyperTransformer.answers`)."""
    assert isinstance(model, ContinualHyperTransformer)
    total = torch.zeros(())
    for t, state in enumerate(model.states(sequence, draw)):
        x = torch.cat([episode.query_x for episode in sequence[: t + 1]], 1)
        y = torch.cat([episode.query_y for episode in sequence[: t + 1] if episode.query_y is not None], 1).flatten()
        written, by_means = model.head_and_means(state, x)
        total = total + 0.5 * (F.cross_entropy(written.flatten(0, 1), y) + warm_up * F.cross_entropy(by_means.flatten(0, 1), y))
    return total


@torch.no_grad()
def remembered(model: nn.Module, episodes: int = TEST_SEQUENCES) -> dict[str, Any]:
    """Accuracy after both steps: on the classes of the first, of the second, and of the first where other classes' images had stood."""
    assert isinstance(model, ContinualHyperTransformer)
    tests = EpisodeSampler(evaluation(), 4, 1, queries=15, tasks=TEST_BATCH, seed=TEST_SEED)
    others = EpisodeSampler(evaluation(), 4, 1, queries=1, tasks=TEST_BATCH, seed=TEST_SEED + 1)
    found = []
    for index in range(episodes // TEST_BATCH):
        first, second = halves(tests.sample(index))
        elsewhere = halves(others.sample(index))[0]
        state, misled = (model.states(sequence)[-1] for sequence in ([first, second], [elsewhere, second]))
        hits = [
            (model.predict(held, episode.query_x).argmax(-1) == episode.query_y).float().mean().item()
            for held, episode in ((state, first), (state, second), (misled, first))
        ]
        found.append(hits)
    first_kept, second_known, control = torch.tensor(found).mean(0).tolist()
    return {"first": first_kept, "second": second_known, "control": control}

