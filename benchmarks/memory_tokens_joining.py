"""M5 and M7: memories trained apart are joined in one model, and one of them goes out again.

Three tasks on the digits backbone: digits 5-9 upright, turned by 90 and by 180 degrees, each learned by a learner of its
own, saved, and loaded onto a fresh copy of the backbone.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from continual_cases import Gate
from memory_tokens_arms import ARMS, accuracy, backbone_of, make, task_of
from memory_tokens_reference import Mask, masked_pass
from torch import Tensor, nn
from transformers import ViTForImageClassification

from remanence.learner import fit
from remanence.parts.hosts import no_progress_bar
from remanence.probes.statistics import interval
from remanence.task import Task
from remanence.tokens import MemoryTokens, MemoryViT, from_pretrained, load_task, save_pretrained, save_task

Part = dict[str, Any]
RATE, N_SEEDS, TOLERANCE = 1e-2, 5, 1e-5


def with_head(folder: Path) -> Any:
    """The pretrained backbone together with the head of its old classes."""
    with no_progress_bar():
        return ViTForImageClassification.from_pretrained(folder, local_files_only=True).eval()


def train_apart(folder: Path, scratch: Path, seed: int, steps: int) -> list[tuple[Task, MemoryTokens, Path]]:
    """Digits 5-9 upright, turned by 90 and by 180 degrees, each learned by a learner of its own and saved."""
    found = []
    for turns in range(3):
        task = task_of("digits", quarter_turns=turns)
        assert task.train is not None
        learner: MemoryTokens = make("memory M=5", folder, len(task.train), seed, RATE, steps)
        fit(learner, task)
        found.append((task, learner, save_task(learner.memory, task.name, scratch / f"{turns}.safetensors")))
    return found


def joined(folder: Path, files: list[Path]) -> MemoryViT:
    """A fresh backbone with the memories of some files."""
    memory = MemoryViT(with_head(folder))
    for file in files:
        load_task(memory, file)
    return memory


@torch.no_grad()
def join_once(seed: int, steps: int, scratch: Path) -> dict[str, Any]:
    """One seed of M5 and M7."""
    folder = backbone_of("digits", seed)
    trained = train_apart(folder, scratch, seed, steps)
    files, names = [file for *_, file in trained], [task.name for task, *_ in trained]
    memory, twin, plain = joined(folder, files), joined(folder, files), with_head(folder)
    first = trained[0][0]
    pixels = (first.test.inputs - 0.5) / 0.5
    together = memory(pixels)
    solo = {name: learner.memory(pixels).logits[name] for name, (_, learner, _) in zip(names, trained, strict=True)}
    result: dict[str, Any] = {
        "parameters_equal": all(
            all(map(torch.equal, memory.task(name).parameters(), learner.memory.task(name).parameters()))
            for name, (_, learner, _) in zip(names, trained, strict=True)
        ),
        "largest_difference_to_solo": max(float((together.logits[name] - solo[name]).abs().max()) for name in names),
        "twin_equal": all(torch.equal(value, together.logits[name]) for name, value in twin(pixels).logits.items()),
        "base_equal": torch.equal(together.base.logits, plain(pixels).logits),
        "solo_accuracy": accuracy(trained[0][1], first.test, first.name),
    }
    masks: tuple[Mask, ...] = ("table", "new sees new", "old sees new", "none")
    for mask in masks:
        result[f"accuracy: {mask}"] = _first_accuracy(memory, first, pixels, mask)
    result["accuracy: none, first task alone"] = _first_accuracy(joined(folder, files[:1]), first, pixels, "none")
    return result | _forget(folder, files, names, pixels, scratch)


def _first_accuracy(memory: MemoryViT, task: Task, pixels: Tensor, mask: Mask) -> float:
    labels = torch.tensor(memory.task(task.name).classes)[masked_pass(memory, pixels, mask).logits[task.name].argmax(1)]
    return float((labels == task.test.targets).double().mean())


def _forget(folder: Path, files: list[Path], names: list[str], pixels: Tensor, scratch: Path) -> dict[str, Any]:
    """M7: remove the middle of three, beside a model that never held it."""
    memory, never = joined(folder, files), joined(folder, [files[0], files[2]])
    before = sum(path.stat().st_size for path in save_pretrained(memory, scratch / "held"))
    own = save_task(memory, names[1], scratch / "own.safetensors").stat().st_size
    memory.remove_task(names[1])
    kept = scratch / "kept"
    after = sum(path.stat().st_size for path in save_pretrained(memory, kept))
    ours, theirs = memory(pixels), never(pixels)
    again = from_pretrained(with_head(folder), kept)(pixels)
    return {
        "forgot_logits_equal": all(torch.equal(ours.logits[name], theirs.logits[name]) for name in (names[0], names[2])),
        "forgot_base_equal": torch.equal(ours.base.logits, theirs.base.logits),
        "forgot_tensors_equal": _same_tensors(memory, never),
        "forgot_saved_equal": all(torch.equal(again.logits[name], value) for name, value in ours.logits.items()),
        "bytes_before": before, "bytes_after": after, "bytes_of_middle": own,
    }  # fmt: skip


def _same_tensors(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def learner_forgets() -> bool:
    """The learner's own verb: learn three, forget the middle; its state equals that of one that learned two."""
    kind, own = ARMS["memory M=5"]
    tasks = [task_of("digits", quarter_turns=turns) for turns in range(3)]
    states = []
    for order in ((0, 1, 2), (0, 2)):
        learner: Any = kind(backbone_of("digits", 0), epochs=1, batch_size=64, **own)  # type: ignore[call-arg]
        for index in order:
            fit(learner, tasks[index])
        if len(order) == 3:
            fit(learner, tasks[1], "forget")
        states.append(learner.state_dict())
    return _equal_state(*states)


def _equal_state(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(_equal_state(first[key], second[key]) for key in first)
    return bool(first == second)


def join_and_forget(quick: bool) -> tuple[Part, list[Gate]]:
    """M5 and M7 over seeds."""
    with tempfile.TemporaryDirectory() as scratch:
        seeds = list(range(1 if quick else N_SEEDS))
        rows = [join_once(seed, 300, Path(scratch) / str(seed)) for seed in seeds]
    losses = {
        mask: [row["solo_accuracy"] - row[f"accuracy: {mask}"] for row in rows]
        for mask in ("table", "new sees new", "old sees new", "none", "none, first task alone")
    }
    part: Part = {"tasks": "digits 5-9 upright, turned by 90 degrees, by 180 degrees", "seeds": seeds, "lr": RATE, "rows": rows}
    part["points_lost_by_first"] = {mask: interval(values)._asdict() | {"seeds": values} for mask, values in losses.items()}
    for mask, values in losses.items():
        print(f"M5, mask '{mask}': the first task loses {100 * interval(values).mean:+.1f} points")
    return part, list(_join_gates(rows, part))


def _join_gates(rows: list[dict[str, Any]], part: Part) -> Iterator[Gate]:
    def every(row: str, criterion: str, *keys: str) -> Gate:
        held = [all(seen[key] for key in keys) for seen in rows]
        return Gate(row, criterion, f"{sum(held)} of {len(held)} seeds", all(held))

    yield every("M5", "joined: parameters torch.equal, twin in the same order torch.equal, base torch.equal",
                "parameters_equal", "twin_equal", "base_equal")  # fmt: skip
    worst = max(row["largest_difference_to_solo"] for row in rows)
    yield Gate("M5", "joined logits - solo logits, fp32: max abs <= 1e-5", f"{worst:.1e}", worst <= TOLERANCE)
    lost = part["points_lost_by_first"]["none"]
    seen = f"{100 * lost['mean']:.1f} [{100 * lost['low']:.1f}, {100 * lost['high']:.1f}] points"
    yield Gate("M5", "joined without a mask: the first task loses >= 5 points (mean)", seen, lost["mean"] >= 0.05)
    yield every("M7", "middle of three removed: logits, base, tensors torch.equal to a model that never held it; so after saving",
                "forgot_logits_equal", "forgot_base_equal", "forgot_tensors_equal", "forgot_saved_equal")  # fmt: skip
    drops = [row["bytes_before"] - row["bytes_after"] == row["bytes_of_middle"] for row in rows]
    first = rows[0]
    seen = f"{first['bytes_before']} -> {first['bytes_after']} bytes, the task's own file {first['bytes_of_middle']}"
    yield Gate("M7", "files shrink by the task's own size", seen, all(drops))
    forgot = learner_forgets()
    yield Gate("M7", "the learner's forget: state equal to that of one that never learned the task", str(forgot), forgot)
