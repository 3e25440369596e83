"""Tiny backbones of every supported kind, memories with something in them, and the paper's mask written plainly.

Axes: B batch, n backbone tokens, T tasks, M memory rows, D width, H heads.
"""

import torch
from torch.nn import functional as F
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from remanence.keys import generator, keyed_rng
from remanence.tokens import MemoryViT

SIZE = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS = {
    "ViTModel": lambda **s: ViTModel(ViTConfig(**s, intermediate_size=32), add_pooling_layer=False),
    "ViTForImageClassification": lambda **s: ViTForImageClassification(ViTConfig(**s, intermediate_size=32)),
    "DeiTModel": lambda **s: DeiTModel(DeiTConfig(**s, intermediate_size=32)),
    "DeiTForImageClassification": lambda **s: DeiTForImageClassification(DeiTConfig(**s, intermediate_size=32)),
    "Dinov2Model": lambda **s: Dinov2Model(Dinov2Config(**s, mlp_ratio=2)),
    "Dinov2ForImageClassification": lambda **s: Dinov2ForImageClassification(Dinov2Config(**s, mlp_ratio=2)),
}


def backbone(kind="ViTModel", seed=0, attention="sdpa", **settings):
    """A model whose every number, biases and layer scales included, is drawn: nothing is hidden by zeros or ones."""
    with keyed_rng("zoo", kind, seed):
        model = KINDS[kind](**(SIZE | settings))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
            elif "weight" in name:
                parameter.data.mul_(8)
    model.set_attn_implementation(attention)
    return model.eval()


def images(n=4, seed=0, size=8):
    return torch.rand(n, 1, size, size, generator=generator("images", seed))


@torch.no_grad()
def stir(memory, name, seed=0):
    """Give a task's tensors values of the size that training gives them."""
    draws = generator("stir", seed, name)
    for parameter in memory.trainable_parameters(name):
        parameter.add_(torch.randn(parameter.shape, generator=draws).to(parameter) * 0.5)


def memory_of(model, *names, seed=0, **settings):
    """A memory with unrelated tasks of two classes."""
    memory = MemoryViT(model)
    for index, name in enumerate(names):
        memory.add_task(name, [2 * index, 2 * index + 1], **({"tokens": 3} | settings))
        stir(memory, name, seed)
    return memory


def train(memory, name, pixels, labels, steps=3, lr=1e-2, read=None):
    """A few steps of AdamW on one task; `read` gives its logits."""
    optimizer = torch.optim.AdamW(memory.trainable_parameters(name), lr=lr)
    for _ in range(steps):
        logits = memory(pixels, [name]).logits[name] if read is None else read()
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()


def allowed(memory, n, rows, old_sees_new=False):
    """Table 1 of the paper as a mask: (n + T, n + T + M) True where a row's token may attend to a column's.

    Args:
        rows: how many memory rows each task has in this layer.
        old_sees_new: the mutation that the tests must catch.
    """
    tasks = memory.tasks
    n_tasks = len(tasks)
    starts = [n + n_tasks + sum(rows[:index]) for index in range(n_tasks)]
    mask = torch.zeros(n + n_tasks, n + n_tasks + sum(rows), dtype=torch.bool)
    mask[:, :n] = True
    if old_sees_new:
        mask[:n] = True
    for row, name in enumerate(tasks):
        for source in (name, *memory.task(name).parents):
            column = tasks.index(source)
            mask[n + row, n + column] = True
            mask[n + row, starts[column] : starts[column] + rows[column]] = True
    return mask


def masked_sequence(memory, pixels, old_sees_new=False, everyone=False):
    """One sequence of backbone tokens, class tokens and memory under the mask: logits of all tasks, and the backbone's tokens.

    Args:
        everyone: no mask at all, as when memories are naively joined.
    """
    trunk = memory.view.trunk
    layers = trunk.layers if hasattr(trunk, "layers") else trunk.encoder.layer
    parts = [memory.task(name) for name in memory.tasks]
    hidden = trunk.embeddings(pixels)
    n, batch = hidden.shape[1], len(pixels)
    hidden = torch.cat([hidden, torch.stack([part.class_token for part in parts]).expand(batch, -1, -1)], 1)
    for index, layer in enumerate(layers):
        norm1 = getattr(layer, "layernorm_before", None) or layer.norm1
        norm2 = getattr(layer, "layernorm_after", None) or layer.norm2
        scale1, scale2 = getattr(layer, "layer_scale1", lambda x: x), getattr(layer, "layer_scale2", lambda x: x)
        rows = [part.memory[part.layers.index(index)] if index in part.layers else part.memory.new_zeros(0, 16) for part in parts]
        normed = [norm1(row) if part.norm == "pre" else row for row, part in zip(rows, parts, strict=True)]
        keys_from = torch.cat([norm1(hidden), torch.cat(normed).expand(batch, -1, -1)], 1)
        attention = layer.attention

        def heads(x):
            return x.view(*x.shape[:2], 2, 8).transpose(1, 2)

        query = heads(attention.q_proj(norm1(hidden)))
        key, value = heads(attention.k_proj(keys_from)), heads(attention.v_proj(keys_from))
        scores = query @ key.transpose(2, 3) / 8**0.5
        if not everyone:
            scores = scores.masked_fill(~allowed(memory, n, list(map(len, rows)), old_sees_new), -torch.inf)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, -1, 16)
        hidden = hidden + scale1(attention.o_proj(attended))
        hidden = hidden + scale2(layer.mlp(norm2(hidden)))
    hidden = trunk.layernorm(hidden)
    logits = {name: part.head(hidden[:, n + index]) for index, (name, part) in enumerate(zip(memory.tasks, parts, strict=True))}
    return logits, hidden[:, :n]
