"""The paper's form of memory tokens: one sequence of old and new tokens under an attention mask. Slow and plain.

It reads the layers of a transformers ViT directly, so that it shares no code with the side stream that it checks.

Axes: B batch, n tokens of the backbone, T tasks, M memory tokens of all tasks, D width, H heads, d = D / H.

Source: Sandler et al. 2022 (arXiv 2203.15243), Fig. 3 and Table 1; parents as a graph in place of one order are ours.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.tokens import MemoryViT, TaskMemory

Mask = Literal["table", "old sees new", "new sees new", "none"]


@dataclass(frozen=True)
class MaskedPass:
    """`logits`: task -> (B, C); `old`: the backbone's rows (B, n, D) after every layer, the last one after the final norm."""

    logits: dict[str, Tensor]
    old: list[Tensor]


def attention_mask(memory: MemoryViT, n: int, layer: int, mask: Mask) -> Tensor:
    """(n + T, n + T + M) True where a row may look: backbone, then class tokens; columns have the memories of a layer behind.

    Args:
        mask: "table" is the paper's Table 1; the others are mutations: the backbone sees all, class tokens see all, both.
    """
    names = memory.tasks
    owners = [name for name in names for _ in _rows(memory.task(name), layer)]
    columns = [*names, *owners]
    allowed = torch.zeros(n + len(names), n + len(columns), dtype=torch.bool)
    allowed[:, :n] = True
    for row, name in enumerate(names):
        read = (name, *memory.task(name).parents)
        allowed[n + row, n:] = torch.tensor([mask in ("none", "new sees new") or column in read for column in columns])
    allowed[:n, n:] = mask in ("none", "old sees new")
    return allowed


def _rows(task: TaskMemory, layer: int) -> Tensor:
    return task.memory[task.layers.index(layer)] if layer in task.layers else task.memory.new_zeros(0, task.memory.shape[-1])


@torch.no_grad()
def masked_pass(memory: MemoryViT, pixels: Tensor, mask: Mask = "table") -> MaskedPass:
    """All tasks in one sequence; every task needs a class token of its own."""
    vit: Any = getattr(memory.model, "vit", memory.model)
    tasks = [memory.task(name) for name in memory.tasks]
    hidden: Tensor = vit.embeddings(pixels)
    n = hidden.shape[1]
    old = [hidden]
    hidden = torch.cat([hidden, torch.stack([_own(task) for task in tasks]).expand(len(pixels), -1, -1)], 1)
    for index, block in enumerate(vit.layers):
        hidden = _layer(block, hidden, [(task, _rows(task, index)) for task in tasks], attention_mask(memory, n, index, mask))
        old.append(hidden[:, :n])
    hidden = vit.layernorm(hidden)
    old[-1] = hidden[:, :n]
    return MaskedPass({name: task.head(hidden[:, n + i]) for i, (name, task) in enumerate(zip(memory.tasks, tasks, strict=True))}, old)


def _own(task: TaskMemory) -> Tensor:
    assert task.class_token is not None
    return task.class_token


def _layer(block: Any, hidden: Tensor, memories: list[tuple[TaskMemory, Tensor]], allowed: Tensor) -> Tensor:
    """One pre-norm layer whose memory rows are looked at, never look, and are gone behind it."""
    attention = block.attention
    normed = block.layernorm_before(hidden)
    rows = torch.cat([block.layernorm_before(row) if task.norm == "pre" else row for task, row in memories])
    joined = torch.cat([normed, rows.expand(len(hidden), -1, -1)], 1)

    def split(value: Tensor) -> Tensor:
        return value.reshape(*value.shape[:2], attention.num_attention_heads, -1).transpose(1, 2)

    query, key, value = split(attention.q_proj(normed)), split(attention.k_proj(joined)), split(attention.v_proj(joined))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed.to(hidden.device))
    hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
    finished: Tensor = hidden + block.mlp(block.layernorm_after(hidden))
    return finished
