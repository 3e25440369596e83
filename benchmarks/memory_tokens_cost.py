"""M6: what many tasks cost in one pass, beside the backbone alone and beside one pass for each task.

Shape of ViT-B/32 (width 768, depth 12, heads 12, image 224, patch 32; n = 50 tokens) with random weights, batches of 8,
five memory tokens per layer. All contenders take turns within one process on one thread; a row is the median over rounds.

Axes: B batch, T tasks, n tokens of the backbone.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from continual_cases import Gate
from memory_tokens_exact import classifier, images, randomise
from torch import Tensor

from remanence.probes.cost import count_flops
from remanence.tokens import MemoryViT

Part = dict[str, Any]
SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "num_channels": 3}
TASKS, BATCH, ROUNDS, N_CLASSES = (1, 4, 16, 64), 8, 7, 10
SEPARATE = 4
SLACK, HALF = 0.10, 0.5


def build(shape: dict[str, int], n_tasks: int) -> MemoryViT:
    """A backbone with random weights and tasks with random numbers."""
    memory = MemoryViT(classifier(shape))
    for number in range(n_tasks):
        memory.add_task(f"task {number}", range(N_CLASSES))
    randomise(memory)
    return memory.requires_grad_(False)


def contenders(memory: MemoryViT, pixels: Tensor) -> dict[str, Callable[[], object]]:
    """Name -> call: the backbone alone, T tasks in one pass, and `SEPARATE` passes of one task each."""
    names = memory.tasks
    calls: dict[str, Callable[[], object]] = {"base": lambda: memory.model(pixels)}
    for n_tasks in TASKS:
        if n_tasks <= len(names):
            calls[f"T={n_tasks}"] = lambda chosen=names[:n_tasks]: memory(pixels, chosen)  # type: ignore[misc]
    calls["separate"] = lambda: [memory(pixels, [name]) for name in names[:SEPARATE]]
    return calls


@torch.inference_mode()
def measure(calls: dict[str, Callable[[], object]], memory: MemoryViT, rounds: int) -> dict[str, dict[str, float]]:
    """Name -> median seconds and FLOPs. A pass of one other task empties the bank of keys, so each is warmed up first."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            # the bank keeps the keys of the last set of tasks; the deployed model has them from its load on
            _warm(name, call, memory)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": median(seconds[name]), "fastest": min(seconds[name]), "flops": count_flops(call)} for name, call in calls.items()
    }


def _warm(name: str, call: Callable[[], object], memory: MemoryViT) -> None:
    if name.startswith("T="):
        memory._bank_of(tuple(memory.tasks[: int(name[2:])]))


def law(n_tasks: int, n_tokens: int) -> float:
    """The most that T tasks may cost, in passes of the backbone."""
    return 1 + 3 * n_tasks / n_tokens + SLACK


def cost_part(quick: bool) -> tuple[Part, list[Gate]]:
    """M6."""
    memory = build(SHAPE, 4 if quick else max(TASKS))
    memory.view.trunk.config.output_hidden_states = False
    pixels = images(memory.model, BATCH)
    pixels = pixels.expand(-1, SHAPE["num_channels"], -1, -1).contiguous()
    calls = contenders(memory, pixels)
    with torch.inference_mode():
        for call in calls.values():
            call()
    found = measure(calls, memory, 3 if quick else ROUNDS)
    part = {"shape": SHAPE, "batch": BATCH, "rounds": ROUNDS, "n_tokens": memory.view.n_tokens, "rows": _rows(found, memory.view.n_tokens)}
    _print(part["rows"])  # type: ignore[arg-type]
    return part, _gates(part["rows"])  # type: ignore[arg-type]


def _rows(found: dict[str, dict[str, float]], n_tokens: int) -> list[dict[str, Any]]:
    base = found["base"]
    # the cheaper of two ways to measure one separate pass: the rival gets the better figure
    one_pass = min(found["separate"]["seconds"] / SEPARATE, found["T=1"]["seconds"])
    rows: list[dict[str, Any]] = []
    for name, value in found.items():
        n_tasks = int(name[2:]) if name.startswith("T=") else 0
        row = {
            "name": name,
            "tasks": n_tasks,
            **value,
            "ratio": value["seconds"] / base["seconds"],
            "flops_ratio": value["flops"] / base["flops"],
        }
        if n_tasks:
            row |= {"limit": law(n_tasks, n_tokens), "share_of_separate": value["seconds"] / (n_tasks * one_pass)}
            row["separate_is_extrapolated"] = n_tasks != SEPARATE
        rows.append(row)
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'M6':<12}{'ms':>9}{'x base':>9}{'limit':>8}{'GFLOP':>9}{'x base':>9}   of T separate passes")
    for row in rows:
        limit = f"{row['limit']:.2f}" if "limit" in row else ""
        share = f"{row['share_of_separate']:.2f}" if "limit" in row else ""
        print(
            f"{row['name']:<12}{1e3 * row['seconds']:>9.0f}{row['ratio']:>9.2f}{limit:>8}{row['flops'] / 1e9:>9.1f}"
            f"{row['flops_ratio']:>9.2f}   {share}"
        )


def _gates(rows: list[dict[str, Any]]) -> list[Gate]:
    measured = [row for row in rows if row["tasks"]]
    times = ", ".join(f"T={row['tasks']}: {row['ratio']:.2f} (limit {row['limit']:.2f})" for row in measured)
    many = [row for row in measured if row["tasks"] >= SEPARATE]
    shares = ", ".join(f"T={row['tasks']}: {row['share_of_separate']:.2f}" for row in many)
    return [
        Gate("M6", "time of T tasks <= base x (1 + 3 T / n + 0.10)", times, all(row["ratio"] <= row["limit"] for row in measured)),
        Gate("M6", "T >= 4: time < 0.5 x T separate passes", shares, all(row["share_of_separate"] < HALF for row in many)),
    ]
