"""What adaptation takes: from a support set to a CNN that is ready, against MAML and fine-tuning, alone and in batches.

All times are medians, one thread, the rivals in turn in the same process, so that a busy machine slows them alike.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from continual_cases import Gate
from hypertransformer_continual import TEST_SEED
from hypertransformer_few_shot import evaluation
from hypertransformer_finetuning import Peak, fine_tune, fine_tuning_curve, random_start
from hypertransformer_maml import MAML
from torch import nn

from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.episode import Episode
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.sampling import EpisodeSampler, SequenceSampler

N_TIMES, BATCH = 50, 64


def medians(calls: dict[str, Callable[[], object]], n_times: int = N_TIMES, block: int = 10) -> dict[str, float]:
    """Milliseconds of each call: blocks of calls in turn, so that a busy machine slows all alike and none finds cold caches."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(-(-n_times // block)):
        for name, call in calls.items():
            call()
            for _ in range(block):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: round(1000 * statistics.median(each), 3) for name, each in times.items()}


def tasks(n_tasks: int, ways: int = 5, shots: int = 1) -> Episode:
    return EpisodeSampler(evaluation(), ways, shots, queries=15, tasks=n_tasks, seed=TEST_SEED).sample(0)


def adaptation(model: nn.Module, maml: nn.Module) -> tuple[dict[str, Any], list[Gate]]:
    """The HyperTransformer against MAML's inner steps and against fine-tuning to where its own accuracy peaks."""
    assert isinstance(model, HyperTransformer)
    assert isinstance(maml, MAML)
    maml.bn_stats = "support"  # a CNN that is ready answers alone; without recording its statistics MAML takes a tenth less
    lr, peak = best_fine_tuning(model)
    figures: dict[str, Any] = {"fine-tuning": {"lr": lr, "steps": peak.steps, "accuracy": round(100 * peak.accuracy, 2)}}
    ratios = {}
    for n_tasks in (1, BATCH):
        episode = tasks(n_tasks)
        x, y, start = episode.support_x, episode.support_y, random_start(model.target, n_tasks, 5)
        with torch.no_grad():
            found = medians(
                {
                    "HyperTransformer": lambda x=x, y=y: model.generate(x, y),
                    "MAML, graph kept": lambda x=x, y=y: maml.adapt(x, y, second_order=True),
                    "MAML, no graph": lambda x=x, y=y: maml.adapt(x, y),
                },
                N_TIMES if n_tasks == 1 else 12,
                10 if n_tasks == 1 else 3,
            )
        tuning = medians({"it": lambda x=x, y=y, start=start: fine_tune(x, y, model.target, start, lr, max(1, peak.steps))}, 3, 3)
        found["fine-tuning to its peak"] = tuning["it"]
        ratios[n_tasks] = {name: round(value / found["HyperTransformer"], 2) for name, value in found.items() if name != "HyperTransformer"}
        figures[f"{n_tasks} tasks"] = {"milliseconds": found, "ratio to the HyperTransformer": ratios[n_tasks]}
    least = ratios[1]["MAML, graph kept"]
    criterion = "HyperTransformer - MAML: adaptation at least 2 times faster than five second-order steps"
    gate = Gate("H5", criterion, f"{least:.2f} times", least >= 2)
    return figures, [gate]


def best_fine_tuning(model: HyperTransformer) -> tuple[float, Peak]:
    """The rate and the steps at which fine-tuning the same CNN from random weights does best, over 64 tasks."""
    episode = tasks(BATCH)
    start = random_start(model.target, BATCH, 5)
    peaks = {lr: fine_tuning_curve(episode, model.target, start, lr=lr, steps=100, every=5).peak for lr in (3e-3, 1e-2, 3e-2)}
    best = max(peaks, key=lambda lr: peaks[lr].accuracy)
    return best, peaks[best]


@torch.no_grad()
def batches(model: nn.Module) -> tuple[dict[str, Any], list[Gate]]:
    """64 tasks in one call against 64 calls, larger episodes against the loop, and what compiling buys."""
    assert isinstance(model, HyperTransformer)
    figures: dict[str, Any] = {}
    gates = []
    for ways, shots, n_tasks in ((5, 1, BATCH), (5, 5, BATCH), (20, 5, 16)):
        wide = HyperTransformer(model.target, head="prototype", max_ways=20).eval()
        chosen = model if ways == 5 else wide
        episode = tasks(n_tasks, ways, shots)
        x, y = episode.support_x, episode.support_y
        found = medians(
            {
                "one call": lambda c=chosen, x=x, y=y: c.generate(x, y),
                "a call for each": lambda c=chosen, x=x, y=y: [c.generate(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)],
            },
            11,
        )
        share = found["one call"] / found["a call for each"]
        figures[f"{n_tasks} tasks, {ways}-way {shots}-shot"] = found | {"share": round(share, 3)}
        limit = 0.4 if (ways, shots) == (5, 1) else 1.0
        criterion = f"one call - the loop: {n_tasks} tasks of {ways}-way {shots}-shot, at most {limit}"
        gates.append(Gate("speed", criterion, f"{share:.3f}", share <= limit))
    figures["torch.compile"] = compiled(model)
    return figures, gates


def compiled(model: HyperTransformer) -> dict[str, Any]:
    """One task and a batch, eager against compiled; the first call's time beside it."""
    figures: dict[str, Any] = {}
    for n_tasks in (1, BATCH):
        episode = tasks(n_tasks)
        x, y = episode.support_x, episode.support_y

        def write(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return model._write(x, y, None, 5)

        try:
            fast = torch.compile(write, dynamic=False)
            start = time.perf_counter()
            fast(x, y)
            first = time.perf_counter() - start
        except Exception as error:  # a machine without a compiler: say so and go on
            return {"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        found = medians({"eager": lambda x=x, y=y: write(x, y), "compiled": lambda x=x, y=y, fast=fast: fast(x, y)}, 21)
        gain = round(found["eager"] / found["compiled"], 2)
        figures[f"{n_tasks} tasks"] = found | {"speed-up": gain, "first call, seconds": round(first, 1)}
    return figures


@torch.no_grad()
def steps_of_a_stream(model: nn.Module, n_tasks: int = 20) -> tuple[dict[str, Any], list[Gate]]:
    """C7: bytes that a task adds, and milliseconds of each step of a stream."""
    assert isinstance(model, ContinualHyperTransformer)
    sequence = SequenceSampler(evaluation(), n_tasks=n_tasks, queries=1, sequences=1, seed=TEST_SEED).sample(0)
    states, times = [model.init_state()], []
    for episode in sequence:
        states.append(model.step(states[-1], episode.support_x, episode.support_y))
    for state, episode in zip(states, sequence, strict=False):
        times.append(medians({"step": lambda s=state, e=episode: model.step(s, e.support_x, e.support_y)}, 21)["step"])
    added = {4 * (after.prototypes.numel() - before.prototypes.numel()) for before, after in pairwise(states)}
    exact = model.target.embedding_width * 5 * 4
    early, late = statistics.median(times[:5]), statistics.median(times[-5:])
    slices = sum(4 * each.numel() for each in states[-1].slices.values())
    return {"milliseconds of a step": times, "bytes of class means a task": sorted(added), "bytes of slices": slices}, [
        Gate("C7", f"class means - d n 4: {exact} bytes a task", f"{sorted(added)}", added == {exact}),
        Gate("C7", "late steps - early steps: time flat within 10 %, 20 tasks", f"{late / early - 1:+.1%}", abs(late / early - 1) <= 0.1),
    ]  # fmt: skip
