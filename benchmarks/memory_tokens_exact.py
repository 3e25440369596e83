"""M1, M2 and M3: old answers bit for bit, and agreement with the paper's masked sequence.

Axes: B batch, T tasks.
"""

import copy
from typing import Any

import torch
from continual_cases import Gate
from memory_tokens_reference import MaskedPass, attention_mask, masked_pass
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from remanence.keys import generator, keyed_rng
from remanence.tokens import MemoryViT

Part = dict[str, Any]
BATCHES, N_TASKS, TOLERANCE, VISIBLE = (1, 7, 64), 20, 1e-5, 1e-3
SHAPES: dict[str, dict[str, int]] = {
    "digits (D 64, L 4, n 17)": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 8, "patch_size": 2},
    "wide (D 768, L 2, n 50)": {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "image_size": 224, "patch_size": 32},
}
RATE = 1e-2


def classifier(shape: dict[str, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A ViT with random weights and a head of ten classes, that gives its hidden states."""
    settings = {"num_channels": 1, "intermediate_size": 4 * shape["hidden_size"], "num_labels": 10} | shape
    with keyed_rng(seed, "random vit"):
        model = ViTForImageClassification(ViTConfig(**settings, output_hidden_states=True))
    return model.to(dtype).eval()


def images(model: Any, n: int, seed: int = 0) -> Tensor:
    """(n, 1, side, side) noise in [-1, 1], in the model's precision."""
    side = model.config.image_size
    return (2 * torch.rand(n, 1, side, side, generator=generator(seed, "images", n)) - 1).to(model.dtype)


def train_briefly(memory: MemoryViT, name: str, pixels: Tensor, steps: int = 3) -> None:
    """A few steps on random labels: the answers need not be right, the numbers must have moved."""
    labels = torch.randint(0, len(memory.task(name).classes), (len(pixels),), generator=generator(0, "labels", name))
    optimizer = torch.optim.AdamW(memory.trainable_parameters(name), lr=RATE)
    capture = memory.view.capture(pixels)
    for _ in range(steps):
        loss = F.cross_entropy(memory.read(capture, [name])[name].float(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def same(first: Any, second: Any) -> bool:
    """Logits and all hidden states, bit for bit."""
    pairs = [(first.logits, second.logits), *zip(first.hidden_states, second.hidden_states, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


# --- M1 ----------------------------------------------------------------------------------------------------------


def old_answers(quick: bool) -> tuple[Part, list[Gate]]:
    """M1: the backbone's answers while 1 to 20 trained tasks are added."""
    rows = []
    for label, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            # the wide shape is dear; it is looked at after fewer additions
            looked_at = range(1, N_TASKS + 1) if label.startswith("digits") else (1, N_TASKS)
            equal, moved = _count_equal(classifier(shape, dtype), set(looked_at), BATCHES[:2] if quick else BATCHES)
            rows.append({"shape": label, "dtype": str(dtype), "equal": sum(equal), "of": len(equal), "parameters_moved": moved})
    seen = "; ".join(f"{row['shape']} {row['dtype']}: {row['equal']} of {row['of']}" for row in rows)
    passed = all(row["equal"] == row["of"] and row["parameters_moved"] for row in rows)
    return {"rows": rows}, [Gate("M1", "old logits and hidden states torch.equal with 1..20 trained tasks, B 1, 7, 64", seen, passed)]


@torch.no_grad()
def _count_equal(model: Any, looked_at: set[int], batches: tuple[int, ...]) -> tuple[list[bool], bool]:
    pixels = {size: images(model, size) for size in batches}
    before = {size: model(value) for size, value in pixels.items()}
    memory, equal, moved = MemoryViT(model), [], True
    for number in range(1, N_TASKS + 1):
        name = f"task {number}"
        made = memory.add_task(name, range(5), parents=memory.tasks[-1:] if number % 3 == 0 else ())
        start = copy.deepcopy(made.memory)
        with torch.enable_grad():
            train_briefly(memory, name, images(model, 8, number))
        moved = moved and not torch.equal(start, made.memory)
        if number in looked_at:
            equal += [same(memory(value).base, before[size]) for size, value in pixels.items()]
    return equal, moved


# --- M2, M3 ------------------------------------------------------------------------------------------------------


def with_graph(model: Any) -> MemoryViT:
    """Five tasks with random numbers: alone, a child, without memory, a child of two, memory at the first layer only."""
    memory = MemoryViT(model)
    memory.add_task("a", range(5))
    memory.add_task("b", range(3), tokens=1, parents=["a"])
    memory.add_task("c", range(4), mode="class", init="normal")
    memory.add_task("d", range(2), tokens=3, parents=["a", "c"], norm="post")
    memory.add_task("e", range(6), tokens=7, mode="input")
    randomise(memory)
    return memory


@torch.no_grad()
def randomise(memory: MemoryViT) -> None:
    """Heads and memories of a size that matters."""
    for name in memory.tasks:
        for part, parameter in memory.task(name).named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator(0, name, part)).to(parameter.dtype))


TABLE_1 = {
    "concatenation": ["yes - - - -", "yes yes yes - -", "yes - - yes yes"],
    "extension": ["yes - - - -", "yes yes yes - -", "yes yes yes yes yes"],
}
"""Rows: backbone, task a, task b; columns: backbone, class token and memory of a, of b."""


def tables_agree() -> bool:
    """The printed table and the reference's mask are the paper's Table 1."""
    for case, expected in TABLE_1.items():
        memory = MemoryViT(classifier(SHAPES["digits (D 64, L 4, n 17)"]))
        memory.add_task("a", range(2), tokens=1)
        memory.add_task("b", range(2), tokens=1, parents=["a"] if case == "extension" else ())
        printed = [" ".join(line.split()[-5:]) for line in memory.mask_table().splitlines()[1:]]
        # reference: one backbone token, C a, C b, M a, M b
        blocks = attention_mask(memory, 1, 0, "table")[:, [0, 1, 3, 2, 4]]
        drawn = [" ".join("yes" if cell else "-" for cell in row) for row in blocks.tolist()]
        if not printed == drawn == expected:
            return False
    return True


@torch.no_grad()
def against_the_mask(quick: bool) -> tuple[Part, list[Gate]]:
    """M2 and M3: the side stream equals one masked sequence, and M1's check notices a wrong mask."""
    rows: list[dict[str, Any]] = []
    for label, shape in SHAPES.items():
        model = classifier(shape)
        memory, pixels = with_graph(model), images(model, 3)
        plain, ours = model(pixels), memory(pixels).logits
        passes = {mask: masked_pass(memory, pixels, mask) for mask in ("table", "old sees new")}
        expected = passes["table"].logits
        rows.append(
            {
                "shape": label,
                "largest_difference": max(float((ours[name] - expected[name]).abs().max()) for name in memory.tasks),
                "masked_sequence": old_difference(plain, passes["table"]),
                "mutated": old_difference(plain, passes["old sees new"]),
            }
        )
    worst = max(row["largest_difference"] for row in rows)
    least = min(row["mutated"]["largest"] for row in rows)
    caught = not any(row["mutated"]["equal"] for row in rows) and least > VISIBLE
    for row in rows:
        print(f"M2, {row['shape']}: one masked sequence against the backbone alone, old hidden states: {row['masked_sequence']}")
    return {"rows": rows}, [
        Gate("M2", "side stream - masked sequence, graph of parents, fp32: max abs < 1e-5", f"{worst:.1e}", worst < TOLERANCE),
        Gate("M2", "mask_table() and the reference's mask are the paper's Table 1", str(tables_agree()), tables_agree()),
        Gate("M3", "old tokens may see new ones: M1's check fails, by more than 1e-3", f"differs by {least:.1e} or more", caught),
    ]


def old_difference(plain: Any, found: MaskedPass) -> dict[str, Any]:
    """M1's check on the reference: layer inputs, and the output behind the final norm."""
    pairs = list(zip(plain.hidden_states[:-1], found.old[:-1], strict=True))
    return {"equal": all(torch.equal(a, b) for a, b in pairs), "largest": max(float((a - b).abs().max()) for a, b in pairs)}
